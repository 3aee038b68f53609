"""Metrics of runs that never were, with the names of real ones: for the reports' tests."""

import json
import math
from pathlib import Path

import numpy as np


def lines(
    steps: int, *, seed: int = 0, gain: float = 0.3, evaluate_every: int = 10, tapo: bool = True, start: float = 0.2
) -> list[dict]:
    """Lines of metrics.jsonl: accuracy rises from `start` by `gain`; a step takes 2 s; 100 questions are held out."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(steps + 1):
        done = step / max(steps, 1)
        accuracy = start + gain * (1 - math.exp(-3 * done)) / (1 - math.exp(-3))
        line: dict = {"step": step}
        if step % evaluate_every == 0 or step == steps:
            half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 100)
            line |= {
                "eval/accuracy": accuracy,
                "eval/accuracy_low": accuracy - half,
                "eval/accuracy_high": accuracy + half,
            }
            line |= {"eval/episodes": 100, "time/eval": 1.0}
        if step:
            noisy = float(np.clip(accuracy + 0.05 * rng.normal(), 0, 1))
            shared = float(0.55 - 0.15 * done + 0.03 * rng.normal())
            line |= {
                "reward/mean": 0.45 + noisy, "reward/accuracy": noisy, "reward/format": 0.9 + 0.08 * done,
                "loss/entropy": 0.5 - 0.2 * done,
                "tapo/correctable_actions": shared, "tapo/corrected_actions": 0.8 * shared if tapo else 0.0,
                "rollout/turns": 3.5, "rollout/length": 300 - 20 * done, "rollout/written": 90 - 20 * done,
                "tools/calls": 2.6, "tools/errors": 0.2 * (1 - done),
                "time/step": 2.0, "time/rollout": 1.2, "time/decode": 0.7, "time/prefill": 0.3, "time/tool_wait": 0.05,
                "time/logprobs": 0.2, "time/update": 0.5, "time/tapo": 0.01,
            }  # fmt: skip
            for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
                line[f"tapo/correctable_actions_at_{threshold}"] = max(0.0, shared + 0.5 * (0.7 - threshold))
                line[f"tapo/correctable_trajectories_at_{threshold}"] = min(1.0, shared + 0.2)
        found.append(line)
    return found


def write(path: Path, given: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in given))
    return path
