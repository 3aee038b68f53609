"""Compare the answers of two evaluations, paired by benchmark, question and sample. Imports no jax."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tapo_jax.config import UserError
from tapo_jax.report.answers import Answer, given
from tapo_jax.report.benchmarks import LABELS
from tapo_jax.report.statistics import bootstrap, mcnemar, paired_shares

Pair = tuple[Answer, Answer]
RULES: dict[str, Callable[[Answer], float]] = {
    "right": lambda answer: float(answer.right),
    "exact match": lambda answer: answer.exact_match,
    "published rule": lambda answer: answer.exact_match_published,
}


def pairs_of(first: Sequence[Answer], second: Sequence[Answer]) -> list[Pair]:
    """Return the answers that both gave to the same sample of the same question."""
    others = {(*answer.key, answer.asked): answer for answer in second}
    return [(a, others[*a.key, a.asked]) for a in first if (*a.key, a.asked) in others]


def compare(first: Path, second: Path) -> str:
    """Return a Markdown table of the differences B − A. Raises UserError if the two have no answer in common."""
    a, b = given(first), given(second)
    pairs = pairs_of(a, b)
    if not pairs:
        raise UserError(
            f"{first} and {second} have no question in common, or other questions under the same ids: compare "
            "evaluations of the same data."
        )
    names = list(dict.fromkeys(one.benchmark for one, _ in pairs))
    lines = [
        f"A: {first}, B: {second}. Differences are B − A in points of the same {len(pairs)} answers.",
        "",
        "| benchmark | rule | questions | A | B | B − A | 95 % | only A | only B | p |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        mine = [pair for pair in pairs if name in ("all", pair[0].benchmark)]
        for rule, value in RULES.items():
            judged = [pair for pair in mine if rule != "right" or (pair[0].judged and pair[1].judged)]
            if judged:
                lines.append(_row(LABELS.get(name, name), rule, judged, value))
    unpaired = len(a) + len(b) - 2 * len(pairs)
    unjudged = sum(not (one.judged and other.judged) for one, other in pairs)
    lines += ["", f"{unpaired} answers have no partner, and {unjudged} pairs have no verdict on one side: left out."]
    return "\n".join(lines) + "\n"


def _row(name: str, rule: str, pairs: Sequence[Pair], value: Callable[[Answer], float]) -> str:
    """Return the line of one rule. With one sample a question the interval is Newcombe's and p McNemar's; with several
    it is a bootstrap over questions, whose samples stay together."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one, other in pairs:
        groups.setdefault((one.benchmark, one.question), []).append((value(one), value(other)))
    mean_Qx2 = np.array([np.mean(group, axis=0) for group in groups.values()])
    a, b = mean_Qx2.mean(axis=0)
    if len(pairs) == len(groups):
        right = mean_Qx2 >= 1.0
        only_a, only_b = (int((right[:, i] & ~right[:, 1 - i]).sum()) for i in (0, 1))
        both, neither = int(right.all(axis=1).sum()), int((~right).all(axis=1).sum())
        interval, p = paired_shares(both, only_a, only_b, neither), f"{mcnemar(only_a, only_b):.3f}"
    else:
        only_a, only_b = (int((mean_Qx2[:, i] > mean_Qx2[:, 1 - i]).sum()) for i in (0, 1))
        interval, p = bootstrap(mean_Qx2[:, 1] - mean_Qx2[:, 0]), "–"
    ends = "–" if interval is None else f"{100 * interval[0]:+.1f} – {100 * interval[1]:+.1f}"
    cells = [name, rule, str(len(groups)), f"{100 * a:.1f} %", f"{100 * b:.1f} %", f"{100 * (b - a):+.1f}", ends]
    return "| " + " | ".join([*cells, str(only_a), str(only_b), p]) + " |"
