"""Evaluation: the training rollout without gradients, and metrics with intervals.

`measure.py` serves the training loop; `checkpoint.py` is the program for a checkpoint (`launch/eval.py`).
"""

from tapo_jax.evaluate.measure import added, evaluate, numbers, play, split_prompts, table, tally, wilson

__all__ = ["added", "evaluate", "numbers", "play", "split_prompts", "table", "tally", "wilson"]
