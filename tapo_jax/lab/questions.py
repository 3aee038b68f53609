"""Answer the questions of the laboratory (`QUESTIONS`), each with a small dict of numbers that JSON can hold."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tapo_jax.lab import measure, published
from tapo_jax.lab.methods import Method
from tapo_jax.lab.simulate import Runs, simulate
from tapo_jax.lab.worlds import World

RATES = (1.4, 2.8, 5.6, 11.2, 22.4, 44.8)
"""Learning rates, beyond the best one on both sides. At the smallest one a hundred updates make some progress, as they
do for a large model."""
BAND = World(guess=1 / 3, lookup=0.5, skill=0.6, reading=0.3, steps=3)
"""The world that questions about settings start from: p_t = .065 is less than half of p_g."""
PAIR = {"base": {"tapo": False}, "TAPO": {}}

CURVES: dict[str, dict[str, Any]] = {
    "GRPO": {"tapo": False},
    "GRPO + TAPO": {},
    "GSPO": {"tapo": False, "algorithm": "gspo"},
    "GSPO + TAPO": {"algorithm": "gspo"},
    "SAPO": {"tapo": False, "algorithm": "sapo"},
    "SAPO + TAPO": {"algorithm": "sapo"},
    "shuffled": {"control": "shuffled"},
    "zero_tools": {"control": "zero_tools"},
    "GiGPO": {"control": "gigpo"},
}
"""The methods whose curves are drawn, and whose updates to a given accuracy are counted; two updates per batch."""

GUESS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
TOOLS = (0.02, 0.04, 0.08, 0.12, 0.17, 0.24)
SKILLS = (0.95, 0.75, 0.5)
"""The axes of the phase diagram: p_g, p_t, and the probability of the right tool step (headroom is 1 minus it)."""

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "theta 0.5": {"theta": 0.5},
    "theta 0.9": {"theta": 0.9},
    "exact match": {"theta": 1.0},
    "alpha_min 0": {"alpha_min": 0.0},
    "alpha_min 0.5": {"alpha_min": 0.5},
    "beta 0.4": {"beta": 0.4},
    "beta 1.2": {"beta": 1.2},
    "no support": {"support": False},
    "no clip": {"clip": False},
    "G = 4": {"group": 4},
    "G = 16": {"group": 16},
    "shuffled": {"control": "shuffled"},
    "zero_tools": {"control": "zero_tools"},
    "GiGPO": {"control": "gigpo"},
}
"""Settings of TAPO and controls, each over guess rate × tool skill; calls are written freely (spread .4)."""

ASSUMPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "the plain world": ({}, {}, 1.0),
    "similarities of .4 to 1": ({"spread": 0.6}, {}, 1.0),
    "wrong calls look alike (.75)": ({"overlap": 0.75}, {}, 1.0),
    "a wrong step is harmless with .3": ({"harmless": 0.3}, {}, 1.0),
    "half of each step shared": ({"sharing": 0.5}, {}, 1.0),
    "a network, 32 questions": ({"policy": "network"}, {}, 1.0),
    "Adam": ({}, {"optimizer": "adam"}, 0.0143),
    "4 updates a batch": ({}, {"updates_per_batch": 4}, 1.0),
    "GSPO": ({}, {"algorithm": "gspo"}, 1.0),
    "SAPO": ({}, {"algorithm": "sapo"}, 1.0),
    "GRPO, sequence means": ({}, {"aggregation": "seq_mean_token_mean"}, 1.0),
}
"""What the plain world leaves out, one at a time: changes of the world, of the method, and a factor on the rates."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and the function that answers it."""

    asks: str
    """The question in words."""
    answer: Callable[[Sequence[int], int], dict[str, Any]]
    """answer(seeds, updates) -> numbers."""
    seeds: int
    updates: int


def tables(seeds: Sequence[int], updates: int) -> dict[str, Any]:
    """Recompute the two tables of the first simulation, next to their published numbers."""
    cells, rows = [], []
    for row in published.rows():
        for name, setting in row["methods"].items():
            rate = row["rate"] * (row["steps"] + 2)  # that simulation summed over an episode's tokens
            world = World(
                guess=row["guess"], lookup=row["q"], skill=row["skill"], reading=row["reading"], steps=row["steps"]
            )
            cells.append((world, Method(rate=rate, aggregation="seq_mean_token_sum_norm", **setting)))
            rows.append({"table": row["table"], "world": row["label"], "method": name, "at": row["at"]})
            rows[-1]["published"] = row["published"][name]
    for row, runs in zip(rows, simulate(cells, seeds, updates), strict=True):
        at_X = [at for at in row["at"] if at <= updates]
        row["here"] = [round(float(runs.accuracy[:, at].mean()), 3) for at in at_X]
        row["lookup"] = round(float(runs.lookup[:, -1].mean()), 3)
        row["collapsed"] = round(float(measure.collapsed(runs).mean()), 3)
    apart = [abs(a - b) for row in rows for a, b in zip(row["here"], row["published"], strict=False)]
    return {
        "rows": rows,
        "largest_difference": round(max(apart), 3),
        "mean_difference": round(float(np.mean(apart)), 4),
    }


def curves(seeds: Sequence[int], updates: int) -> dict[str, Any]:
    """Return curves, updates to an accuracy and collapse of every method, at its own best learning rate and at all."""
    named = {name: (BAND, setting | {"updates_per_batch": 2}) for name, setting in CURVES.items()}
    found = by_rate(named, RATES, seeds, updates)
    out = {}
    for name, runs_R in found.items():
        rate, best = measure.at_best_rate(runs_R, measure.mean_accuracy)
        out[name] = {
            "rate": rate,
            "accuracy": measure.curve(best.accuracy),
            "lookup": measure.curve(best.lookup),
            "mean_accuracy": round(float(measure.mean_accuracy(best).mean()), 4),
            "collapsed": [round(float(measure.collapsed(runs).mean()), 3) for runs in runs_R.values()],
            "updates": {
                level: [measure.median(measure.updates_to(runs, level)) for runs in runs_R.values()]
                for level in (0.5, 0.9)
            },
            "best_updates": {level: _fastest(runs_R, level) for level in (0.5, 0.9)},
        }
    return {"rates": RATES, "world": describe(BAND), "methods": out}


def _fastest(runs_R: Mapping[float, Runs], level: float) -> dict[str, Any]:
    """Return the median updates to an accuracy, at the rate that is best for this.

    For the choice of the rate, a run that never gets there counts as one that does at the end.
    """
    rate, best = measure.at_best_rate(
        runs_R, lambda runs: -np.minimum(measure.updates_to(runs, level), runs.accuracy.shape[1])
    )
    return {"rate": rate, "median": measure.median(measure.updates_to(best, level))}


def phases(seeds: Sequence[int], updates: int) -> dict[str, Any]:
    """Return TAPO − GRPO over guess rate × tool skill × headroom, at a common rate and at their own best rates."""
    return diagram({"TAPO": {}}, SKILLS, RATES[::2], seeds, updates)


def variants(seeds: Sequence[int], updates: int) -> dict[str, Any]:
    """Return settings and controls − GRPO of the same group size over guess rate × tool skill, at a common rate."""
    return diagram(VARIANTS, (0.6,), RATES[:1], seeds, updates, guesses=GUESS[::2], tools=TOOLS[1:5], spread=0.4)


def diagram(
    settings: Mapping[str, Mapping[str, Any]],
    skills: Sequence[float],
    rates: Sequence[float],
    seeds: Sequence[int],
    updates: int,
    *,
    guesses: Sequence[float] = GUESS,
    tools: Sequence[float] = TOOLS,
    spread: float = 0.0,
) -> dict[str, Any]:
    """Return differences of mean accuracy to the base, with intervals, by setting, skill, p_t and p_g; two tool steps.

    If p_t cannot be reached with such tool steps (the reading would exceed 1), the cell is None.
    """
    named = {}
    for skill in skills:
        for p_t in tools:
            for guess in guesses:
                if p_t <= skill**2:
                    world = World(guess=guess, skill=skill, reading=p_t / skill**2, steps=2, spread=spread)
                    groups = {setting.get("group", 8) for setting in settings.values()}
                    base = {f"base {group}": {"tapo": False, "group": group} for group in groups}
                    for name, setting in (base | dict(settings)).items():
                        named[name, skill, p_t, guess] = (world, setting)
    found = by_rate(named, rates, seeds, updates)
    common = {key: runs_R[rates[0]] for key, runs_R in found.items()}
    best = {key: measure.at_best_rate(runs_R, measure.mean_accuracy)[1] for key, runs_R in found.items()}

    def cell(runs: Mapping[Any, Runs], name: str, *at: float) -> dict[str, Any] | None:
        if (name, *at) not in runs:
            return None
        one, base = runs[name, *at], runs[f"base {settings[name].get('group', 8)}", *at]
        difference = measure.difference(measure.mean_accuracy(one), measure.mean_accuracy(base))
        ends = [round(float(measure.collapsed(end).mean()), 3) for end in (base, one)]
        return difference | {"base": round(float(measure.mean_accuracy(base).mean()), 4), "collapsed": ends}

    cells = {
        which: {
            name: [[[cell(runs, name, skill, p_t, guess) for guess in guesses] for p_t in tools] for skill in skills]
            for name in settings
        }
        for which, runs in (("common", common), ("best", best))
    }
    return {"guess": guesses, "tools": tools, "skills": skills, "rates": rates, "lookup": 0.5, "cells": cells}


def assumptions(seeds: Sequence[int], updates: int) -> dict[str, Any]:
    """Return TAPO − base with one change to the plain world, at every rate and at their own best rates."""
    out = {}
    for name, (world, method, factor) in ASSUMPTIONS.items():
        cell = dataclasses.replace(BAND, **world)
        found = by_rate(
            {which: (cell, setting | method) for which, setting in PAIR.items()},
            [rate * factor for rate in RATES],
            seeds,
            updates,
        )
        out[name] = compare(found["base"], found["TAPO"])
    return {"rows": out, "world": describe(BAND), "rates": RATES}


def collapse(seeds: Sequence[int], updates: int) -> dict[str, Any]:
    """Return the share of seeds that lose their tools, by p_t and learning rate, if half of all guesses are right."""
    tools = (0.04, 0.06, 0.08, 0.11, 0.15, 0.2, 0.25, 0.3)
    methods = {"GRPO": {"tapo": False}, "TAPO": {}, "zero_tools": {"control": "zero_tools"}}
    worlds = {p_t: World(guess=0.5, skill=0.6, reading=p_t / 0.36, steps=2) for p_t in tools}
    named = {(name, p_t): (worlds[p_t], setting) for p_t in tools for name, setting in methods.items()}
    rates = RATES[:3:2]
    found = by_rate(named, rates, seeds, updates)
    shares = {
        name: {str(rate): [float(measure.collapsed(found[name, p_t][rate]).mean()) for p_t in tools] for rate in rates}
        for name in methods
    }
    return {"guess": 0.5, "tools": tools, "rates": rates, "collapsed": shares}


def compare(base_R: Mapping[float, Runs], tapo_R: Mapping[float, Runs]) -> dict[str, Any]:
    """Compare TAPO with its base at every common rate, and both at their own best rates."""
    rate_base, base = measure.at_best_rate(base_R, measure.mean_accuracy)
    rate_tapo, tapo = measure.at_best_rate(tapo_R, measure.mean_accuracy)
    return {
        "common": [{"rate": rate} | measure.versus(base_R[rate], tapo_R[rate]) for rate in base_R],
        "best": {"rates": [rate_base, rate_tapo]} | measure.versus(base, tapo),
    }


def by_rate(
    named: Mapping[Any, tuple[World, Mapping[str, Any]]], rates: Sequence[float], seeds: Sequence[int], updates: int
) -> dict[Any, dict[float, Runs]]:
    """Return {name: {rate: Runs}} of (world, settings of the method) by name."""
    keys = [(name, rate) for name in named for rate in rates]
    cells = [(named[name][0], Method(rate=rate, **named[name][1])) for name, rate in keys]
    found: dict[Any, dict[float, Runs]] = {name: {} for name in named}
    for (name, rate), runs in zip(keys, simulate(cells, seeds, updates), strict=True):
        found[name][rate] = runs
    return found


def describe(world: World) -> dict[str, Any]:
    """Return the fields of a world in a form that JSON can hold."""
    return {name: np.asarray(value).tolist() for name, value in dataclasses.asdict(world).items()}


QUESTIONS: dict[str, Question] = {
    "tables": Question("Are the numbers of the first simulation found again?", tables, 64, 400),
    "curves": Question("How do the methods learn, each at its own best learning rate?", curves, 32, 300),
    "phases": Question("Where does TAPO help?", phases, 16, 200),
    "variants": Question("What do TAPO's settings and the controls change about that?", variants, 16, 200),
    "assumptions": Question("Does it depend on what the plain world leaves out?", assumptions, 24, 200),
    "collapse": Question("Where are the tools lost?", collapse, 32, 300),
}
