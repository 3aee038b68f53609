"""Evaluate an agent on held-out questions: play them, add up over processes, give shares with intervals."""

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
    """Play every prompt once and yield the items of `numbers`; yield nothing without prompts.

    prompts: those of all processes; each process plays its share and all yield the same values.
    temperature: 0 is greedy.
    """
    if prompts:
        episodes, played = play(agent, params, prompts, temperature=temperature, top_p=top_p, seed=seed)
        yield from numbers(added(tally(episodes, played))).items()


def play(
    agent: Agent, params: Any, prompts: Sequence[Prompt], *, temperature: float, top_p: float = 1.0, seed: int
) -> tuple[list[Episode], dict[str, float]]:
    """Return one episode for each of this process's prompts, and the rollout's metrics."""
    parts = np.array_split(np.arange(len(prompts)), jax.process_count())
    mine = parts[jax.process_index()]
    first = int(mine[0]) if len(mine) else 0
    sampling = Sampling(temperature, top_p, seed, first_prompt=first)
    return agent.play(params, [prompts[i] for i in mine], 1, sampling)


def tally(episodes: Sequence[Episode], played: Mapping[str, float]) -> dict[str, float]:
    """Return sums that can be added over processes; right, reward and episodes count judged episodes only.

    played: the rollout's metrics, which are means over these episodes.
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
    """Return the sums over all processes. Every process must call this."""
    count = jax.process_count()
    return {name: value * count for name, value in processes.mean_over(counts).items()}


def numbers(counts: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation from its sums.

    accuracy, accuracy_low, accuracy_high (Wilson, 95 %), episodes (judged ones): over all questions, and by hop count
    as …/hops_n.
    unjudged: share of episodes without a verdict; they count in none of the above and not in reward.
    reward: mean over the judged episodes.
    answered: share of episodes with an answer.
    turns, length and written (tokens), tool_calls, errors: means per episode; the last two also by tool and by kind.
    finish/…: shares.
    """
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
    """Return the score interval of a share (Wilson 1927): all p with |p̂ − p| ≤ z·sqrt(p(1−p)/n); (0, 1) if n is 0."""
    if count == 0:
        return 0.0, 1.0
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def split_prompts(config: ConfigDict) -> list[Prompt]:
    """Return the first eval.prompts questions of eval.split in one fixed order, the same for every seed.

    Questions whose images cannot be shown are left out.
    """
    source = sources.prompts(config, config.eval.split)
    order = np.random.default_rng(0).permutation(len(source))[: config.eval.prompts]
    return showable([source[int(index)] for index in order])


def table(values: Mapping[str, float]) -> str:
    """Return two Markdown tables of the result of `numbers`: accuracy by hop count, and means per episode."""
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
