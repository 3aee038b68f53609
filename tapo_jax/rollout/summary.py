"""Summarise a rollout as metrics."""

from collections.abc import Sequence

import numpy as np

from tapo_jax.types import Episode

FINISHES = ("answer", "length", "turns", "malformed")
ERRORS = (
    "unparsable",
    "unknown_tool",
    "bad_arguments",
    "bad_image",
    "bad_box",
    "timeout",
    "service",
    "replay_miss",
    "exception",
)


def summary(
    episodes: Sequence[Episode], tools: Sequence[str], seconds: float, services: Sequence[str] = ()
) -> dict[str, float]:
    """Return means over the episodes; the names of the metrics are always the same for the same tools and services.

    A call of an unknown tool counts only as an error.
    """
    turns = [turn for episode in episodes for turn in episode.turns]
    calls = [turn for turn in turns if turn.result is not None]
    count = max(len(episodes), 1)
    written = sum(int(episode.mask_T.sum()) for episode in episodes)
    metrics = {
        "rollout/turns": sum(not turn.continues for turn in turns) / count,
        "rollout/length": sum(len(episode.token_T) for episode in episodes) / count,
        "rollout/written": written / count,
        "rollout/thoughts_closed": sum(turn.forced is not None for turn in turns) / count,
        "rollout/images": sum(len(episode.images) for episode in episodes) / count,
        "tools/calls": sum(turn.call is not None and turn.call.name in tools for turn in calls) / count,
        "tools/errors": sum(turn.result.error is not None for turn in calls) / count,
        "time/tools": sum(turn.result.seconds for turn in calls),
        "perf/tokens_per_s": written / seconds,
    }
    for finish in FINISHES:
        metrics[f"rollout/finish_{finish}"] = sum(episode.finish == finish for episode in episodes) / count
    for name in tools:
        metrics[f"tools/calls/{name}"] = sum(turn.call is not None and turn.call.name == name for turn in calls) / count
    for kind in ERRORS:
        metrics[f"tools/errors/{kind}"] = sum(turn.result.error == kind for turn in calls) / count
    other = sum(turn.result.error not in (None, *ERRORS) for turn in calls)
    metrics["tools/errors/other"] = other / count
    return metrics | service_summary(episodes, services)


def service_summary(episodes: Sequence[Episode], services: Sequence[str]) -> dict[str, float]:
    """Return what the tools asked each service, as means over the episodes; {} without services.

    calls = live + cache_hits + joined + replayed; failures are calls of any of these. The seconds are quantiles of the
    live calls, NaN without one.
    """
    metrics = {}
    results = [turn.result for episode in episodes for turn in episode.turns if turn.result is not None]
    for service in services:
        found = [result for result in results if result.origin is not None and result.origin.service == service]
        live = [result.seconds for result in found if result.origin.source == "live"]
        counts = {
            "service_calls": len(found),
            "live": len(live),
            "cache_hits": sum(result.origin.source == "cache" for result in found),
            "joined": sum(result.origin.source == "joined" for result in found),
            "replayed": sum(result.origin.source == "replay" for result in found),
            "retries": sum(result.origin.retries for result in found),
            "failures": sum(result.error is not None for result in found),
        }
        metrics |= {f"tools/{name}/{service}": count / max(len(episodes), 1) for name, count in counts.items()}
        for quantile in (50, 95, 99):
            seconds = float(np.percentile(live, quantile)) if live else float("nan")
            metrics[f"tools/seconds_p{quantile}/{service}"] = seconds
    return metrics
