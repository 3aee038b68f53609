from .curve import write_curve
from .misplaced import write_credit
from .tables import write_sweep
from .truth import write_truth

__all__ = ["write_credit", "write_curve", "write_sweep", "write_truth"]
