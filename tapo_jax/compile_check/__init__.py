"""Will a run fit its machines, and how fast can it be there: its real programs, compiled for a TPU without a TPU."""
