"""When does credit transfer help? Small simulated worlds of tool use, trained by this project's own arithmetic.

What is public is listed in `__init__.pyi` and imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
