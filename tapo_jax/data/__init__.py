"""Questions from data sets: `read(name, directory, split)`. On the command line: `python -m tapo_jax.data`."""

from tapo_jax.data.readers import read

__all__ = ["read"]
