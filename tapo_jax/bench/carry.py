"""Measure what carrying groups over saves where some tool calls are slow: whole rollouts of several steps.

The conversations are those of `bench/rollout.py`, with uneven lengths; of their tool calls a share takes many times as
long as the others, the same calls on all sides. Each side plays the same number of groups to their end: a step of
training needs P complete groups. "waits" says what a round does while a tool runs: "all" waits for every result, so
that a run repeats bit for bit; "none" goes on (rollout.tool_wait_s=0).

s: seconds of a step's rollout, the mean over all steps, of the round that is the median.
times faster: against no carry with the same waiting, the median over the rounds.
idle: share of decoding steps × slots in which no token was drawn.
tool wait: share of the seconds in which nothing but tools ran.
recomputed: tokens of carried conversations that were computed anew, over all that were computed once.
stale: steps by which the tokens of a batch are older than its policy, in the mean.
"""

import dataclasses
import time
from typing import Any

import numpy as np

from tapo_jax.bench.rollout import size_of
from tapo_jax.bench.rollout_ours import OurRollout
from tapo_jax.bench.rollout_work import LookUp, Work, make_work, prompts
from tapo_jax.rollout.flight import Flight
from tapo_jax.rollout.rounds import play_groups
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.tools.base import ToolRunner
from tapo_jax.types import Prompt

WAITS = {"all": float("inf"), "none": 0.0}


def add_arguments(parser) -> None:
    parser.set_defaults(repeats=3)
    parser.add_argument("--size", default="tiny", choices=("tiny", "small"), help="as in rollout")
    parser.add_argument("--steps", type=int, default=6, help="steps of training whose rollouts are played")
    parser.add_argument("--questions", type=int, default=8, help="P, different questions of a step")
    parser.add_argument("--group", type=int, default=8, help="conversations of a question")
    parser.add_argument("--carry", type=int, nargs="+", default=[2, 4], help="groups that may be unfinished")
    parser.add_argument("--tool", type=float, default=0.05, help="seconds of a tool call")
    parser.add_argument("--slow", type=float, default=0.02, help="share of the calls that are slow")
    parser.add_argument("--times", type=float, default=20.0, help="how many times as long these take")


class SlowLookUp(LookUp):
    """A tool that answers as the work says, after the seconds of the call."""

    def __init__(self, work: Work, *, tool_s: float, slow: float, times: float):
        super().__init__(work)
        rng = np.random.default_rng(0)
        self.seconds = [[tool_s * (times if rng.random() < slow else 1.0) for _ in row] for row in work.response]

    def __call__(self, arguments: dict[str, Any], images: Any) -> Any:
        time.sleep(self.seconds[arguments["row"]][arguments["turn"]])
        return super().__call__(arguments, images)


class Questions:
    """The questions of the work, P a step."""

    skipped = 0

    def __init__(self, work: Work, batch: int):
        self.rows: list[int] = []
        self._prompts, self._batch, self._next = prompts(work), batch, 0

    def __next__(self) -> list[Prompt]:
        self.rows = list(range(self._next, self._next + self._batch))
        self._next += self._batch
        return [self._prompts[row] for row in self.rows]

    def read(self, row: int) -> Prompt:
        return self._prompts[row]


def run(args) -> list[dict]:
    from tapo_jax.bench import model_jax  # noqa: PLC0415 - jax starts its devices only here

    size = size_of(args.size)
    shape = dict(questions=args.questions * args.steps, group=args.group, turns=4, question=64, written=24, response=32)
    work = make_work(size.config, **shape, uneven=True)
    tool = SlowLookUp(work, tool_s=args.tool, slow=args.slow, times=args.times)
    slots = args.questions * args.group
    player = OurRollout(model_jax.random_model(size.config, size.dtype), work, slots=slots, chunk=8)
    player.players.runner.close()
    runner = ToolRunner([tool], workers=slots, timeout_s=120.0, retries=0)
    sides = [(waits, carry) for waits in WAITS for carry in (0, *args.carry)]
    measured: dict[tuple, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(args.repeats + 1):  # the first compiles
        for waits, carry in sides:
            players = dataclasses.replace(player.players, runner=runner, tool_wait_s=WAITS[waits])
            found = play(players, player.params, work, carry, args)
            if number:
                measured[waits, carry].append(found)
    runner.close()
    return [row(side, measured) for side in sides]


def play(players: Any, params: Any, work: Work, carry: int, args) -> dict[str, float]:
    """Play the rollouts of all steps; return seconds and shares."""
    flight = Flight(
        Questions(work, args.questions),
        local=range(args.questions),
        batch=args.questions,
        group_size=args.group,
        carry=carry,
        max_staleness=2,
        total=args.steps,
    )
    sums = dict.fromkeys(("drawn", "steps", "recomputed", "waited", "stale"), 0.0)
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        groups = flight.begin(step)
        seconds = play_groups(
            players, params, groups, Sampling(1.0, step=step), until=flight.until, counts=flight.counts
        )
        players.sampler.release()
        taken = flight.take()
        sums["stale"] += flight.metrics(taken, players.sampler.slots)["rollout/staleness"] / args.steps
        sums["waited"] += seconds["time/tool_wait"]
        for name in ("drawn", "steps", "recomputed"):
            sums[name] += getattr(flight.counts, name)
    sums["seconds"] = time.perf_counter() - began
    sums["idle"] = 1 - sums["drawn"] / (sums["steps"] * players.sampler.slots)
    sums["step_s"], sums["once"] = sums["seconds"] / args.steps, work.distinct + work.total_written
    return sums


def row(side: tuple, measured: dict[tuple, list[dict[str, float]]]) -> dict[str, Any]:
    """Return a line of the table."""
    waits, carry = side
    rounds, before = measured[side], measured[waits, 0]
    faster = [a["seconds"] / b["seconds"] for a, b in zip(before, rounds, strict=True)]
    middle = {name: float(np.median([one[name] for one in rounds])) for name in rounds[0]}
    return {
        "waits": waits,
        "carry": carry,
        "s": middle["step_s"],
        "times faster": float(np.median(faster)) if carry else "",
        "idle": middle["idle"],
        "tool wait": middle["waited"] / middle["seconds"],
        "recomputed": middle["recomputed"] / middle["once"],
        "stale": middle["stale"],
    }
