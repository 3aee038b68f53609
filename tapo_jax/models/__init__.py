"""Vision-language models. `hf.load` returns a model and its config from a directory in Hugging Face form.

Public names are listed in `__init__.pyi` and imported on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
