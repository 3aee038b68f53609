"""Benchmarks, each against another implementation in the same run: `python -m tapo_jax.bench NAME`.

A benchmark is a module with `add_arguments(parser)` and `run(args) -> list[dict]`: one dict a row, all with the same
keys. `__main__.NAMES` lists them. Nothing here is public.
"""

__all__: list[str] = []
