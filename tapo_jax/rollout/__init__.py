"""Turn prompts into episodes: conversations in KV slots, tools on threads, tokens from the sampler.

Public names are listed in `__init__.pyi` and imported on first use. Never imports `tapo_jax.learn`.
`tapo_jax.rollout.generate.generate` samples from a model without tools.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
