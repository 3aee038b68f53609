from . import advantages, losses
from .advantages import group_advantages, has_signal
from .batches import pack
from .checkpoints import Checkpoints
from .losses import aggregate, importance_weight, kl, policy_loss
from .optimizer import make_optimizer
from .state import TrainState

__all__ = [
    "Checkpoints",
    "TrainState",
    "advantages",
    "aggregate",
    "group_advantages",
    "has_signal",
    "importance_weight",
    "kl",
    "losses",
    "make_optimizer",
    "pack",
    "policy_loss",
]
