"""Atlas, the embedded world: country outlines to look at, facts to look up, questions about both.

What is public is listed in `__init__.pyi` and imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
