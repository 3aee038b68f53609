"""The table of an evaluation by benchmark, from its answers: exact match and judge next to each other. No jax."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tapo_jax.report.answers import SERVICES, Answer, by_question
from tapo_jax.report.statistics import pass_at, share_of_questions

LABELS = {
    "mmsearch": "MMSearch", "hr_mmsearch": "HR-MMSearch", "fvqa_test": "FVQA-test", "infoseek": "InfoSeek",
    "simplevqa": "SimpleVQA", "livevqa": "LiveVQA", "mat_search": "MAT-Search",
}  # fmt: skip
_RULES = ("exact match", "published rule", "judge", "right", "95 %")


def row(answers: Sequence[Answer], *, judged: bool) -> dict[str, Any]:
    """Return the numbers of one benchmark; a mean of nothing is None.

    questions, answers: how many.
    exact_match, exact_match_published: means over all answers, of this project's rule and of the published one.
    accuracy: mean of what the reward calls right, over the answers that have a verdict; low, high: its 95 % interval.
    judge: the same with a judge, None without one. exact_match_low, …: the interval of each rule.
    pass_at: {k: chance that one of k samples is right}, for k = 1, 2, 4, …; pass_at[1] is the mean over samples.
    unjudged: share of answers without a verdict.
    answered, finish: shares. calls, errors: means per answer, by tool and by kind; service_failures and policy_faults
        are the sums of the errors that are a service's and the policy's.
    turns, tokens, written: means per answer.

    judged: whether there was a judge.
    """
    groups = list(by_question(answers).values())
    count, samples = max(len(answers), 1), max((len(group) for group in groups), default=1)
    known = [[answer for answer in group if answer.judged] for group in groups]
    known = [group for group in known if group]
    values: dict[str, Any] = {"questions": len(groups), "answers": len(answers), "samples": samples}
    for name in ("exact_match", "exact_match_published"):
        values |= _share(name, [[getattr(answer, name) for answer in group] for group in groups], samples)
    right = [[float(answer.right) for answer in group] for group in known]
    values |= _share("accuracy", right, samples)
    values["judge"] = values["accuracy"] if judged else None
    values |= {"low": values["accuracy_low"], "high": values["accuracy_high"]}
    values["pass_at"] = {str(k): _pass(right, k) for k in _powers(samples)}
    values["unjudged"] = sum(not answer.judged for answer in answers) / count
    values["answered"] = sum(answer.answer is not None for answer in answers) / count
    values["reward"] = _mean([answer.reward for group in known for answer in group])
    for name in ("turns", "tokens", "written", "service_failures", "policy_faults"):
        values[name] = sum(getattr(answer, name) for answer in answers) / count
    for name in ("calls", "errors"):
        total: Counter[str] = Counter()
        for answer in answers:
            total.update(getattr(answer, name))
        values[name] = {key: total[key] / count for key in sorted(total)}
    finish = Counter(answer.finish for answer in answers)
    return values | {"finish": {key: finish[key] / count for key in sorted(finish)}}


def _share(name: str, value_QxK: Sequence[Sequence[float]], samples: int) -> dict[str, float | None]:
    mean_Q = [float(np.mean(value_K)) for value_K in value_QxK]
    low, high = share_of_questions(mean_Q, samples)
    return {name: _mean(mean_Q), f"{name}_low": low, f"{name}_high": high}


def _mean(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean if math.isfinite(mean) else None


def _powers(samples: int) -> list[int]:
    """Return 1, 2, 4, … and the number of samples itself."""
    return sorted({1 << n for n in range(samples.bit_length()) if 1 << n <= samples} | {samples})


def _pass(right_QxK: Sequence[Sequence[float]], k: int) -> float | None:
    """Return pass@k over the questions with at least k verdicts."""
    return _mean([pass_at(int(sum(right_K)), len(right_K), k) for right_K in right_QxK if len(right_K) >= k])


def rows(answers: Sequence[Answer], *, judged: bool) -> dict[str, dict[str, Any]]:
    """Return `row` of each benchmark, in the order of the published tables and then as they come."""
    names = [name for name in LABELS if any(answer.benchmark == name for answer in answers)]
    names += [name for name in dict.fromkeys(answer.benchmark for answer in answers) if name not in LABELS]
    return {name: row([a for a in answers if a.benchmark == name], judged=judged) for name in names}


def table(found: Mapping[str, Mapping[str, Any]], expected: Mapping[str, int] | None = None) -> str:
    """Return Markdown tables of the result of `rows`.

    expected: questions of each benchmark, shown where fewer have been answered.
    """
    samples = max((one["samples"] for one in found.values()), default=1)
    names = [str(k) for k in _powers(samples)]
    passes = [f"{'mean' if k == '1' else 'pass'}@{samples if k == '1' else k}" for k in names] if samples > 1 else []
    lines = [
        _line(
            "benchmark", "questions", "exact match", "published rule", "judge", "right", "95 %", *passes, "no verdict"
        ),
        "|---|" + "---:|" * (7 + len(passes)),
    ]
    for name, one in found.items():
        whole = (expected or {}).get(name, one["questions"])
        count = str(one["questions"]) if whole == one["questions"] else f"{one['questions']} of {whole}"
        shares = [_percent(one[field]) for field in ("exact_match", "exact_match_published", "judge", "accuracy")]
        interval = f"{100 * one['low']:.1f} – {100 * one['high']:.1f} %"
        chances = [_percent(one["pass_at"].get(k)) for k in names] if passes else []
        lines.append(_line(LABELS.get(name, name), count, *shares, interval, *chances, _percent(one["unjudged"])))
    tools = sorted({tool for one in found.values() for tool in one["calls"]})
    kinds = sorted({kind for one in found.values() for kind in one["errors"]})
    head = ["turns", "tokens", "written", "answered", *tools, "failures of services", "faults of the policy"]
    lines += ["", "Means per answer; calls by tool:", "", _line("benchmark", *head), "|---|" + "---:|" * len(head)]
    for name, one in found.items():
        numbers = [f"{one[field]:.1f}" for field in ("turns", "tokens", "written")] + [_percent(one["answered"])]
        numbers += [f"{one['calls'].get(tool, 0.0):.2f}" for tool in tools]
        numbers += [f"{one[field]:.3f}" for field in ("service_failures", "policy_faults")]
        lines.append(_line(LABELS.get(name, name), *numbers))
    if kinds:
        lines += ["", "Errors per answer, by kind (*: of a service):", ""]
        marked = [f"{kind}*" if kind in SERVICES else kind for kind in kinds]
        lines += [_line("benchmark", *marked), "|---|" + "---:|" * len(kinds)]
        for name, one in found.items():
            lines.append(_line(LABELS.get(name, name), *(f"{one['errors'].get(kind, 0.0):.3f}" for kind in kinds)))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
