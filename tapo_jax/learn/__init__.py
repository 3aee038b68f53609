"""From episodes to an update: advantages, losses, log-probabilities, the train step, checkpoints.

What is public is listed in `__init__.pyi` and imported when it is first used. Never imports `tapo_jax.rollout`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
