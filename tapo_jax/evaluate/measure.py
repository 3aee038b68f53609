"""Evaluate an agent on held-out questions: play them, add up over processes, give shares with intervals."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tapo_jax import processes
from tapo_jax.agent import Agent
from tapo_jax.data import sources
from tapo_jax.data.pipeline import showable
from tapo_jax.report.statistics import wilson
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.rollout.summary import FINISHES, summary
from tapo_jax.types import Episode, Prompt


def evaluate(agent: Agent, params: Any, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, float]:
    """Play every prompt once and return `Tally.metrics`; {} without prompts.

    prompts: those of all processes; each process plays its share and all return the same values.
    """
    if not prompts:
        return {}
    episodes = play(agent, params, prompts, sampling)
    runner = agent.players.runner
    return Tally.of(episodes, tuple(runner.tools), runner.services).over_processes().metrics()


def play(
    agent: Agent, params: Any, prompts: Sequence[Prompt], sampling: Sampling, *, keep_images: bool = False
) -> list[Episode]:
    """Return one episode for each of this process's prompts, without their images unless they are to be kept."""
    parts = np.array_split(np.arange(len(prompts)), jax.process_count())
    mine = parts[jax.process_index()]
    first = int(mine[0]) if len(mine) else 0
    sampling = dataclasses.replace(sampling, first_prompt=first)
    return agent.play(params, [prompts[i] for i in mine], 1, sampling, keep_images=keep_images)[0]


def sampling_of(config: ConfigDict) -> Sampling:
    """Return how the tokens of an evaluation are drawn."""
    e = config.eval
    return Sampling(
        e.temperature,
        e.top_p,
        config.seed,
        top_k=e.top_k,
        min_p=e.min_p,
        presence_penalty=e.presence_penalty,
    )


@dataclasses.dataclass(frozen=True)
class Tally:
    """Sums over the episodes of an evaluation, which add up over processes."""

    sums: Mapping[str, float]
    """By name: episodes "played"; "episodes", "right" and "reward" of judged ones, the first two also by hops;
    "answered"; "sum/NAME" of every metric that is a mean per episode."""

    @classmethod
    def of(cls, episodes: Sequence[Episode], tools: Sequence[str] = (), services: Sequence[str] = ()) -> "Tally":
        """Count episodes. tools, services: the names by which calls and requests are counted."""
        counts: dict[str, float] = {"played": len(episodes), "episodes": 0, "right": 0, "answered": 0, "reward": 0.0}
        for episode in episodes:
            counts["answered"] += float(episode.answer is not None)
            counts["episodes"] += float(episode.judged)
            counts["right"] += float(episode.success)
            counts["reward"] += episode.reward if episode.judged else 0.0
            hops = f"hops_{episode.prompt.hops}"
            counts[f"episodes/{hops}"] = counts.get(f"episodes/{hops}", 0) + float(episode.judged)
            counts[f"right/{hops}"] = counts.get(f"right/{hops}", 0) + float(episode.success)
        means = summary(episodes, tools, 1.0, services)
        return cls(counts | {f"sum/{name}": means[source] * len(episodes) for name, source in _shown(means).items()})

    def over_processes(self) -> "Tally":
        """Return the sums over all processes. Every process must call this."""
        count = jax.process_count()
        return Tally({name: value * count for name, value in processes.mean_over(self.sums).items()})

    def metrics(self) -> dict[str, float]:
        """Return the metrics of an evaluation.

        accuracy, accuracy_low, accuracy_high (Wilson, 95 %), episodes (judged ones): over all questions, and by hop
        count as …/hops_n.
        unjudged: share of episodes without a verdict; they count in none of the above and not in reward.
        reward: mean over the judged episodes.
        answered: share of episodes with an answer.
        turns, length and written (tokens), tool_calls, errors: means per episode; the last two also by tool and by
        kind.
        finish/…: shares.
        """
        sums, total = self.sums, round(self.sums["played"])
        values: dict[str, float] = {}
        for suffix in ("", *sorted(name.removeprefix("episodes") for name in sums if name.startswith("episodes/"))):
            count, right = round(sums["episodes" + suffix]), round(sums["right" + suffix])
            low, high = wilson(right, count)
            share = right / count if count else math.nan
            values |= {f"accuracy{suffix}": share, f"accuracy_low{suffix}": low, f"accuracy_high{suffix}": high}
            values[f"episodes{suffix}"] = count
        judged = round(sums["episodes"])
        values |= {
            "unjudged": 1 - judged / total,
            "reward": sums["reward"] / judged if judged else math.nan,
            "answered": sums["answered"] / total,
        }
        return values | {
            name.removeprefix("sum/"): value / total for name, value in sums.items() if name.startswith("sum/")
        }


def _shown(means: Mapping[str, float]) -> dict[str, str]:
    """Return the name in an evaluation of each of the rollout's metrics that it has."""
    shown = {
        name.replace("tools/calls", "tool_calls").replace("tools/errors", "errors"): name
        for name in means
        if name.startswith("tools/")
    }
    shown |= {name.removeprefix("rollout/"): name for name in ("rollout/turns", "rollout/length", "rollout/written")}
    return shown | {f"finish/{finish}": f"rollout/finish_{finish}" for finish in FINISHES}


def split_prompts(config: ConfigDict) -> list[Prompt]:
    """Return the first eval.prompts questions of eval.split in one fixed order, the same for every seed.

    Questions whose images cannot be shown are left out.
    """
    source = sources.prompts(config, config.eval.split)
    order = np.random.default_rng(0).permutation(len(source))[: config.eval.prompts]
    return showable([source[int(index)] for index in order])


def table(values: Mapping[str, float]) -> str:
    """Return two Markdown tables of `Tally.metrics`: accuracy by hop count, and means per episode."""
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
