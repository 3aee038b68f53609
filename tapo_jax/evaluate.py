"""How good an agent is on questions that it was not trained on: the same rollout without gradient, and numbers with
their intervals.

`evaluate` yields (name, value) for the training loop; `evaluate_checkpoint.py` is the program for a checkpoint.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tapo_jax import processes
from tapo_jax.agent import Agent
from tapo_jax.data import sources
from tapo_jax.data.pipeline import showable
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.rollout.summary import FINISHES
from tapo_jax.types import Episode, Prompt

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def evaluate(
    agent: Agent, params: Any, prompts: Sequence[Prompt], *, temperature: float, top_p: float = 1.0, seed: int
) -> Iterator[tuple[str, float]]:
    """Plays every prompt once and yields what `numbers` gives. `prompts` are those of all processes; each plays its
    part and all yield the same. temperature 0 is greedy. No prompts: yields nothing."""
    if prompts:
        episodes, played = play(agent, params, prompts, temperature=temperature, top_p=top_p, seed=seed)
        yield from numbers(added(tally(episodes, played))).items()


def play(
    agent: Agent, params: Any, prompts: Sequence[Prompt], *, temperature: float, top_p: float = 1.0, seed: int
) -> tuple[list[Episode], dict[str, float]]:
    """This process's episodes, one of each of its prompts, and their rollout's metrics."""
    parts = np.array_split(np.arange(len(prompts)), jax.process_count())
    mine = parts[jax.process_index()]
    first = int(mine[0]) if len(mine) else 0
    sampling = Sampling(temperature, top_p, seed, first_prompt=first)
    return agent.play(params, [prompts[i] for i in mine], 1, sampling)


def tally(episodes: Sequence[Episode], played: Mapping[str, float]) -> dict[str, float]:
    """Sums that add up over processes. played: the rollout's metrics, which are means over these episodes.

    right, reward and episodes are of judged episodes alone.
    """
    counts: dict[str, float] = {"played": len(episodes), "episodes": 0, "right": 0, "answered": 0, "reward": 0.0}
    for episode in episodes:
        counts["answered"] += float(episode.answer is not None)
        counts["episodes"] += float(episode.judged)
        counts["right"] += float(episode.success)
        counts["reward"] += episode.reward if episode.judged else 0.0
        hops = f"hops_{episode.prompt.hops}"
        counts[f"episodes/{hops}"] = counts.get(f"episodes/{hops}", 0) + float(episode.judged)
        counts[f"right/{hops}"] = counts.get(f"right/{hops}", 0) + float(episode.success)
    shown = {
        name.replace("tools/calls", "tool_calls").replace("tools/errors", "errors"): name
        for name in played
        if name.startswith("tools/")
    }
    shown |= {name.removeprefix("rollout/"): name for name in ("rollout/turns", "rollout/length", "rollout/written")}
    shown |= {f"finish/{finish}": f"rollout/finish_{finish}" for finish in FINISHES}
    return counts | {f"sum/{name}": played[source] * len(episodes) for name, source in shown.items()}


def added(counts: Mapping[str, float]) -> dict[str, float]:
    """The sums over all processes. Every process must call this."""
    count = jax.process_count()
    return {name: value * count for name, value in processes.mean_over(counts).items()}


def numbers(counts: Mapping[str, float]) -> dict[str, float]:
    """accuracy with accuracy_low and accuracy_high (Wilson, 95 %), the same by hop count as …/hops_n, the numbers of
    judged episodes; unjudged (a share; they are in none of these and not in reward); reward; answered (share with an
    answer); means per episode: turns, length and written (tokens), tool_calls and errors, each also by tool and by
    kind; finish/… (shares)."""
    total = round(counts["played"])
    values: dict[str, float] = {}
    for suffix in ("", *sorted(name.removeprefix("episodes") for name in counts if name.startswith("episodes/"))):
        count, right = round(counts["episodes" + suffix]), round(counts["right" + suffix])
        low, high = wilson(right, count)
        share = right / count if count else math.nan
        values |= {f"accuracy{suffix}": share, f"accuracy_low{suffix}": low, f"accuracy_high{suffix}": high}
        values[f"episodes{suffix}"] = count
    judged = round(counts["episodes"])
    values |= {
        "unjudged": 1 - judged / total,
        "reward": counts["reward"] / judged if judged else math.nan,
        "answered": counts["answered"] / total,
    }
    return values | {
        name.removeprefix("sum/"): value / total for name, value in counts.items() if name.startswith("sum/")
    }


def wilson(right: int, count: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927): where |p̂ − p| ≤ z·sqrt(p(1−p)/n). (0, 1) where n is 0."""
    if count == 0:
        return 0.0, 1.0
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def split_prompts(config: ConfigDict) -> list[Prompt]:
    """The same questions whatever the seed: the first eval.prompts of eval.split in one fixed order, without those
    whose images cannot be shown."""
    source = sources.prompts(config, config.eval.split)
    order = np.random.default_rng(0).permutation(len(source))[: config.eval.prompts]
    return showable([source[int(index)] for index in order])


def table(values: Mapping[str, float]) -> str:
    """Two Markdown tables of what `numbers` gives: accuracy by hop count, and what happened per episode."""
    lines = ["| questions | episodes | accuracy | 95 % interval |", "|---|---:|---:|---:|"]
    for suffix in ("", *sorted(name.removeprefix("episodes") for name in values if name.startswith("episodes/"))):
        label = suffix.removeprefix("/hops_") + (" hop" if suffix == "/hops_1" else " hops") if suffix else "all"
        low, high = (100 * values[f"accuracy_{end}{suffix}"] for end in ("low", "high"))
        count, share = values["episodes" + suffix], 100 * values["accuracy" + suffix]
        lines.append(f"| {label} | {count:.0f} | {share:.1f} % | {low:.1f} – {high:.1f} % |")
    lines += ["", "| per episode | |", "|---|---:|"]
    lines += [f"| {name} | {values[name]:.2f} |" for name in ("reward", "turns", "length", "written", "tool_calls")]
    lines += [
        f"| {name.replace('/', ': ')} | {values[name]:.2f} |" for name in values if name.startswith("tool_calls/")
    ]
    lines += [f"| answered | {100 * values['answered']:.1f} % |", f"| not judged | {100 * values['unjudged']:.1f} % |"]
    lines += [f"| errors | {values['errors']:.3f} |"]
    for name, value in values.items():
        if name.startswith("errors/") and value > 0:
            lines.append(f"| {name.replace('/', ': ')} | {value:.3f} |")
    return "\n".join(lines) + "\n"
