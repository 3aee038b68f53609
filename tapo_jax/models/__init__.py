"""Vision-language models. `hf.load` gives a model and its config from a directory in Hugging Face form."""
