"""Tools that a policy calls: what a tool is, how calls run, and the tools that ship. Imports no jax.

What is public is listed in `__init__.pyi` and imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
