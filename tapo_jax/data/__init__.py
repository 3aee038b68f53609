"""Questions from data sets: `read(name, directory, split)`. On the command line: `python -m tapo_jax.data`.

What is public is listed in `__init__.pyi` and imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
