"""Does a run fit its machines, and how fast can it be there: its real programs, compiled for a TPU without a TPU.

The program is `launch/compile_check.py`; nothing here is public.
"""

__all__: list[str] = []
