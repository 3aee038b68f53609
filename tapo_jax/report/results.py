"""Read the runs of a sweep: held-out accuracy by row, with intervals over seeds and paired differences.

A sweep is DIR/<row>/seed_<n>/, each with `result.json` (the output of `condense`: small enough to keep in a repository)
or a whole run's `metrics.jsonl` and `config.json`; a run that failed has `failed.json`, {"error": …}. DIR/sweep.json
may give the order of rows, the base and the reference of each, and the requested seeds: {"rows": [row, …],
"base": {row: row}, "reference": {row: row}, "seeds": {row: [seed, …]}}.

seed_<n>/eval*/export.json, written by `launch/eval.py --checkpoint=…/export`, are later evaluations of the run's last
policy, with more questions or other samples: their mean replaces the run's own last accuracy if all compared runs of
the seed were asked the same number of questions.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapo_jax.config import UserError, flat
from tapo_jax.records import read_json, read_metrics
from tapo_jax.report.statistics import mean_of, student

CURVES = (
    "reward/accuracy",
    "loss/entropy",
    "rollout/length",
    "rollout/written",
    "tools/calls",
    "tapo/correctable_actions",
    "tapo/correctable_trajectories",
    "tapo/corrected_actions",
    "optimizer/grad_norm",
)
AT = "_at_"  # as in tapo/correctable_actions_at_0.7
MIN_SEEDS = 3  # for a verdict
AGAIN = "remove it, and launch/sweep.py does the run again"
POINTS = 40  # max points of a condensed curve
# TAPO as published; what the paper leaves open is this project's default.
PUBLISHED = {
    "algorithm.credit": "tapo", "tapo.beta": 0.8, "tapo.support": True, "tapo.clip": True, "tapo.control": "none",
    "tapo.theta": 0.7, "tapo.cluster": "components", "tapo.cluster_theta": None, "tapo.aggregate": "mean",
    "tapo.scope": "prompt", "tapo.adaptive_theta": False, "tapo.memory_steps": 0, "tapo.alpha_min": 0.25,
    "tapo.text": "dice",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished run."""

    row: str
    seed: int
    evals: tuple[tuple[float, float, float], ...]
    """(step, seconds of training until then, held-out accuracy), ascending."""
    curves: Mapping[str, Sequence[Sequence[float]]]
    """name -> [(step, value)]."""
    config: Mapping[str, Any]
    """Flat names."""
    tapo_share: float | None
    """Median of TAPO's share of a step's time."""
    later: tuple[float, int, int] | None = None
    """Mean accuracy of later evaluations, number of questions, number of answers; None: no later evaluation."""

    def at_step(self, step: float) -> float:
        return float(np.interp(step, [e[0] for e in self.evals], [e[2] for e in self.evals]))

    def at_time(self, seconds: float) -> float | None:
        """Return the accuracy after `seconds` of training; None before the first evaluation."""
        if seconds < self.evals[0][1]:
            return None
        return float(np.interp(seconds, [e[1] for e in self.evals], [e[2] for e in self.evals]))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep."""

    results: Mapping[str, Mapping[int, Result]]
    """Rows in their order -> results by seed."""
    failed: Sequence[tuple[str, int, str]]
    """(row, seed, sentence)."""
    unfinished: Sequence[tuple[str, int]]
    """(row, seed)."""
    base: Mapping[str, str]
    """row -> row."""
    reference: Mapping[str, str]
    """row -> row."""


def condense(workdir: Path, row: str, seed: int) -> dict[str, Any]:
    """Return the small result of a run, from its metrics.jsonl and config.json.

    Seconds are those of the steps, without evaluations; a step that compiled counts as the median of the others,
    because a machine compiles once.

    Raises UserError if the run has not finished, or was not evaluated at its last step.
    """
    lines = read_metrics(workdir / "metrics.jsonl")
    path = workdir / "config.json"
    config = flat(read_json(path, way="remove it, or give a run that is whole")) if path.exists() else {}
    usual = [line["time/step"] for line in lines if line.get("time/step") and not line.get("perf/compiles")]
    seconds, evals = 0.0, []
    for line in lines:
        compiled = bool(line.get("perf/compiles")) and usual
        seconds += float(np.median(usual)) if compiled else line.get("time/step") or 0.0
        if line.get("eval/accuracy") is not None:
            evals.append([line["step"], round(seconds, 3), line["eval/accuracy"]])
    asked = 0 if config.get("total_epochs") else config.get("total_steps", 0)
    if not evals or evals[-1][0] != lines[-1]["step"] or lines[-1]["step"] < asked:
        raise UserError(f"{workdir} holds no evaluation of its last step: run it to its end with eval.at_end.")
    names = {name for line in lines for name in line if name in CURVES or (name.startswith("tapo/") and AT in name)}
    timed = [line for line in lines if line.get("time/step") and line.get("time/tapo") is not None]
    shares = [(line["step"], line["time/tapo"] / line["time/step"]) for line in timed]
    curves = {
        name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in sorted(names)
    }
    curves |= {"time/tapo_share": shares} if shares else {}
    return {
        "row": row,
        "seed": seed,
        "steps": lines[-1]["step"],
        "seconds": round(seconds, 3),
        "evals": evals,
        "final": {name.removeprefix("eval/"): value for name, value in lines[-1].items() if name.startswith("eval/")},
        "tapo_share": float(np.median([share for _, share in shares])) if shares else None,
        "curves": {name: _thinned(points) for name, points in curves.items() if points},
        "config": config,
    }


def _thinned(points: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Return at most POINTS points, each the mean of an equal number of points (the last one of the rest)."""
    size = -(-len(points) // POINTS)
    parts = [np.array(points[start : start + size], float) for start in range(0, len(points), size)]
    return [[float(f"{value:.5g}") for value in part.mean(axis=0)] for part in parts]


def load(directory: Path) -> Sweep:
    """Read a sweep's directory. Raises UserError if no run has finished."""
    results: dict[str, dict[int, Result]] = {}
    failed, unfinished = [], []
    folders = sorted(path for path in directory.glob("*/seed_*") if path.is_dir() and path.name[5:].isdigit())
    for folder in folders:
        row, seed = folder.parent.name, int(folder.name.removeprefix("seed_"))
        if (folder / "failed.json").exists():
            why = read_json(folder / "failed.json", way=AGAIN).get("error", "no reason given")
            failed.append((row, seed, str(why)))
        elif (found := _result(folder, row, seed)) is not None:
            results.setdefault(row, {})[seed] = found
        else:
            unfinished.append((row, seed))
    if not results:
        raise UserError(
            f"{directory} holds no finished run: a sweep's folder has ROW/seed_N/result.json for every run."
        )
    plan = directory / "sweep.json"
    given = read_plan(plan)
    seen = {(row, seed) for row, seed, _ in failed} | {(row, seed) for row in results for seed in results[row]}
    wanted = [(row, seed) for row, seeds in given.get("seeds", {}).items() for seed in seeds]
    unfinished = list(dict.fromkeys([*unfinished, *(run for run in wanted if run not in seen)]))
    rows = [row for row in given.get("rows", []) if row in results]
    results = {row: results[row] for row in [*rows, *(row for row in results if row not in rows)]}
    configs = {row: next(iter(seeds.values())).config for row, seeds in results.items()}
    base, reference = bases(configs)
    for pairs, name in ((base, "base"), (reference, "reference")):
        pairs |= {row: other for row, other in given.get(name, {}).items() if row in results and other in results}
    return Sweep(with_later(results, base), failed, unfinished, base, reference)


def read_plan(path: Path) -> dict[str, Any]:
    """Read a sweep.json; {} if it does not exist. Raises UserError if it is damaged."""
    way = "remove it, and the rows are shown in the order of their names"
    plan = read_json(path, way=way) if path.exists() else {}
    kinds = {"rows": list, "seeds": dict, "base": dict, "reference": dict}
    for name, kind in kinds.items():
        if not isinstance(plan.get(name, kind()), kind):
            raise UserError(f"{path} is damaged ({name} is {plan[name]!r:.40}): {way}.")
    return plan


def with_later(results: Mapping[str, Mapping[int, Result]], base: Mapping[str, str]) -> dict[str, dict[int, Result]]:
    """Return every run with its last accuracy replaced by its later one.

    This is done only if all runs of its seed and family (a base and what is compared with it) have a later accuracy
    from the same number of questions: other questions are easier or harder. Otherwise `later` becomes None.
    """
    asked: dict[tuple[str, int], set[int]] = {}
    for row, seeds in results.items():
        for seed, result in seeds.items():
            asked.setdefault((base.get(row, row), seed), set()).add(result.later[1] if result.later else 0)

    def final(row: str, seed: int, result: Result) -> Result:
        if result.later is None or len(asked[base.get(row, row), seed]) > 1:
            return dataclasses.replace(result, later=None)
        step, seconds, _ = result.evals[-1]
        return dataclasses.replace(result, evals=(*result.evals[:-1], (step, seconds, result.later[0])))

    return {row: {seed: final(row, seed, result) for seed, result in seeds.items()} for row, seeds in results.items()}


def _result(folder: Path, row: str, seed: int) -> Result | None:
    if (folder / "result.json").exists():
        path = folder / "result.json"
        found = read_json(path, way=AGAIN, needs=("evals", "curves", "config", "tapo_share"))
    else:
        path = folder / "metrics.jsonl"
        try:
            found = condense(folder, row, seed)
        except UserError:
            return None
    try:
        evals = tuple((float(step), float(seconds), float(accuracy)) for step, seconds, accuracy in found["evals"])
        config = renamed(found["config"])
        if not evals or not isinstance(found["curves"], dict):
            raise ValueError("it has no evaluations or no curves")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}.") from error
    later = later_accuracy(folder, found["config"])
    return Result(row, seed, evals, found["curves"], config, found["tapo_share"], later)


def later_accuracy(folder: Path, config: Mapping[str, Any]) -> tuple[float, int, int] | None:
    """Return `Result.later`, from the evaluations in folder/eval* on the run's own data.

    Raises UserError for an evaluation whose split or temperature is not the run's own, or whose number of questions
    differs from the others'.
    """
    way, needs = "remove it, or evaluate again", ("split", "temperature", "metrics")
    written = {path: read_json(path, way=way, needs=needs) for path in sorted(folder.glob("eval*/export.json"))}
    for path in sorted(folder.glob("eval*/*/export.json")):
        evaluation = read_json(path, way=way, needs=("data", *needs))
        if same_data(evaluation["data"], config):
            written[path] = evaluation
    paths, found = list(written), list(written.values())
    for path, evaluation in zip(paths, found, strict=True):
        for name in ("split", "temperature"):
            if evaluation[name] != config.get(f"eval.{name}", evaluation[name]):
                raise UserError(
                    f"{path} has the {name} {evaluation[name]!r} and the run {config[f'eval.{name}']!r}: "
                    "evaluate again as the run does, or remove it."
                )
    questions = {round(evaluation["metrics"]["episodes"]) for evaluation in found}
    if len(questions) > 1:
        raise UserError(f"The evaluations in {folder} have different numbers of questions: keep those of one.")
    if not found:
        return None
    accuracy = float(np.mean([evaluation["metrics"]["accuracy"] for evaluation in found]))
    return accuracy, *questions, len(found) * sum(questions)


def same_data(data: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether an evaluation's data are those that a run with this flat config evaluates on."""
    own = {f"data.{name}": value for name, value in flat(data).items() if name != "split"}
    return config.get("eval.split", data["split"]) == data["split"] and all(
        config.get(name, value) == value for name, value in own.items()
    )


# Names of fields in older results.
OLD_NAMES = {
    "data.name": "data.source",
    "reward_source": "reward.source",
    "reward.accuracy": "reward.weights.accuracy",
    "reward.format": "reward.weights.format",
    "tapo.steps": "tapo.max_tool_steps",
    "tapo.gigpo_omega": "algorithm.gigpo_omega",
    "tapo.gigpo_discount": "algorithm.gigpo_discount",
}


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat config with the current names of its fields, in their order."""
    found = {OLD_NAMES.get(name, name): value for name, value in config.items()}
    if "tapo.enabled" in found:
        compared = found.get("tapo.control") == "gigpo"
        found["tapo.control"] = "none" if compared else found.get("tapo.control", "none")
        enabled = found.pop("tapo.enabled")
        found["algorithm.credit"] = ("gigpo" if compared else "tapo") if enabled else "trajectory"
    return found


def assigns_credit(config: Mapping[str, Any]) -> bool:
    """Return whether a run gave parts of a trajectory different credit."""
    return config.get("algorithm.credit", "trajectory") != "trajectory"


def is_of_credit(name: str) -> bool:
    """Return whether a field says how credit is assigned."""
    return name.startswith("tapo.") or name == "algorithm.credit"


def bases(configs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return (base, reference), row -> row each, from the rows' flat configs.

    base[row] is the row with TAPO off that is the same in every field that `is_of_credit` does not name.
    reference[row] is the row with TAPO on in that family that differs from the others in the fewest fields: the method
    as published, around which an ablation changes one field at a time. A tie goes to the row with more of the PUBLISHED
    values.
    """
    base: dict[str, str] = {}
    reference: dict[str, str] = {}
    families: dict[str, list[str]] = {}
    for row, config in configs.items():
        families.setdefault(
            json.dumps({k: v for k, v in config.items() if not is_of_credit(k) and k != "seed"}, sort_keys=True),
            [],
        ).append(row)
    for rows in families.values():
        on = [row for row in rows if assigns_credit(configs[row])]
        off = [row for row in rows if row not in on]
        if off:
            base |= {row: off[0] for row in rows if row != off[0]}
        if len(on) > 2:
            names = {name for row in on for name in configs[row] if is_of_credit(name)}
            apart = {
                row: (
                    sum(configs[row].get(name) != configs[other].get(name) for other in on for name in names),
                    sum(configs[row].get(name, value) != value for name, value in PUBLISHED.items()),
                )
                for row in on
            }
            centre = min(on, key=lambda row: apart[row])
            reference |= {row: centre for row in on if row != centre}
    return base, reference


def difference(
    ours: Mapping[int, Result], theirs: Mapping[int, Result], value: Callable[[Result], float | None]
) -> dict[str, Any] | None:
    """Return the difference of two rows, paired by seed; None without a common seed that has both values.

    verdict: "better" or "worse" if both the bootstrap's and Student's interval exclude 0 and there are at least
    MIN_SEEDS seeds, otherwise "not decided".
    """
    pairs = [(value(ours[seed]), value(theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())]
    pairs = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
    if not pairs:
        return None
    delta_N = [mine - other for mine, other in pairs]
    found = mean_of(delta_N) | {
        "student": student(delta_N),
        "seeds": len(pairs),
        "improved": sum(delta > 0 for delta in delta_N),
    }
    intervals = [found["interval"], found["student"]]
    base_mean = float(np.mean([other for _, other in pairs]))
    found["relative"] = found["mean"] / base_mean if base_mean > 0 else None
    if len(pairs) < MIN_SEEDS or any(low <= 0 <= high for low, high in intervals):
        return found | {"verdict": "not decided"}
    return found | {"verdict": "better" if found["mean"] > 0 else "worse"}


def summarise(sweep: Sweep) -> dict[str, Any]:
    """Return all numbers of the report.

    step: the last step that every run was evaluated at or after.
    seconds: the shortest run's training time.
    """
    runs = [result for seeds in sweep.results.values() for result in seeds.values()]
    step = min(result.evals[-1][0] for result in runs)
    seconds = min(result.evals[-1][1] for result in runs)
    measures: dict[str, Callable[[Result], float | None]] = {
        "step": lambda r: r.at_step(step),
        "time": lambda r: r.at_time(seconds),
    }
    rows = {}
    for row, seeds in sweep.results.items():
        found: dict[str, Any] = {
            "seeds": sorted(seeds),
        }
        for name, value in measures.items():
            known = [v for seed in sorted(seeds) if (v := value(seeds[seed])) is not None]
            found[f"at_{name}"] = mean_of(known) if known else None
            for kind, partner in (("base", sweep.base), ("reference", sweep.reference)):
                other = partner.get(row)
                found[f"{kind}_at_{name}"] = difference(seeds, sweep.results[other], value) if other else None
        shares = [r.tapo_share for r in seeds.values() if r.tapo_share is not None]
        found |= {"base": sweep.base.get(row), "reference": sweep.reference.get(row)}
        found["failed"] = sum(row == other for other, _, _ in sweep.failed)
        found |= {
            "tapo_share": float(np.median(shares)) if shares else None,
            "seconds": float(np.mean([r.evals[-1][1] for r in seeds.values()])),
        }
        rows[row] = found
    return {
        "step": step,
        "seconds": seconds,
        "runs": len(runs),
        "later": sum(result.later is not None for result in runs),
        "answers": max((result.later[2] for result in runs if result.later), default=0),
        "rows": rows,
        "failed": list(sweep.failed),
        "unfinished": list(sweep.unfinished),
    }
