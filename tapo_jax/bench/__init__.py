"""Benchmarks, each against another implementation in the same run.

A benchmark is a module with `add_arguments(parser)` and `run(args) -> list[dict]`: one dict a row, all with the same
keys. `__main__.NAMES` lists them.
"""
