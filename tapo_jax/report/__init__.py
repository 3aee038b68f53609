"""What a run or a sweep came to, from the files that it left. Knows no model and no trainer.

What is public is listed in `__init__.pyi` and imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
