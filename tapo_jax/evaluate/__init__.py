"""Evaluation: the training rollout without gradients, and metrics with intervals.

`play.py` serves the training loop; `checkpoint.py` is the program for a checkpoint (`launch/eval.py`).
"""

from tapo_jax.evaluate.play import added, evaluate, numbers, play, split_prompts, table, tally, wilson

__all__ = ["added", "evaluate", "numbers", "play", "split_prompts", "table", "tally", "wilson"]
