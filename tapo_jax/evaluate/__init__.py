"""Evaluation: the training rollout without gradients, and metrics with intervals.

`measure.py` serves the training loop. `checkpoint.py` is the program for a checkpoint (`launch/eval.py`): on the
questions of a config, or on several published benchmarks in one run (`benchmarks.py`, `asking.py`).
"""

from tapo_jax.evaluate.measure import Tally, evaluate, play, sampling_of, split_prompts, table

__all__ = ["Tally", "evaluate", "play", "sampling_of", "split_prompts", "table"]
