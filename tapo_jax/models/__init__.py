"""Vision-language models. `hf.load` gives a model and its config from a directory in Hugging Face form.

What is public is listed in `__init__.pyi` and imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
