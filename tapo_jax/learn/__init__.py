"""Turn episodes into an update: advantages, losses, log-probabilities, the train step, checkpoints.

Public names are listed in `__init__.pyi` and imported on first use. Never imports `tapo_jax.rollout`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
