"""Compare whole rollouts with loops over transformers: several turns with tool responses between them, text only.

Every conversation writes given numbers of tokens, so that the work is the same on all sides; no token ends a turn. Ours
is the rollout of training (rounds, slots, tools on threads). transformers keeps its cache between the turns; "prompt
copied" also pre-fills a question once and copies its keys and values for the conversations of its group. Tunix's
sampler takes part where it is installed; it is given the whole conversation in every turn. The sides take turns in one
run, after two rollouts each that compile; the tokens of the first, which is greedy, are compared.

prefilled/distinct: tokens given to pre-filling calls over those that have to be.
computed/prefilled: with the padding of these calls.
idle: share of decoding steps × conversations at a time in which no token was written.
compiled: programs compiled in the measured rollouts.
agree: share of equal tokens in the greedy rollouts.
times faster, times less cpu: seconds there over seconds here, by the clock and of all threads; medians of the rounds.
"""

import dataclasses
import importlib.util
import os
import sys
from typing import Any

import numpy as np

from tapo_jax.bench.rollout_work import Played, Side, Work, forbidden, make_work
from tapo_jax.models.config import Qwen3VLConfig

SIZES = ("tiny", "small", "2b", "4b")


def add_arguments(parser) -> None:
    parser.set_defaults(repeats=3)
    parser.add_argument(
        "--size", default="tiny", choices=SIZES, help="tiny: hidden 128 × 4 layers; small: hidden 512 × 8 layers"
    )
    parser.add_argument("--turns", type=int, default=4, help="turns of a conversation; the most of uneven ones")
    parser.add_argument("--question", type=int, default=128, help="tokens of a question; the mean of uneven ones")
    parser.add_argument("--written", type=int, default=32, help="tokens of a turn; the mean of uneven ones")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response; the mean of uneven ones")
    parser.add_argument("--questions", type=int, default=8, help="different questions")
    parser.add_argument("--group", type=int, default=8, help="conversations of a question")
    parser.add_argument("--lengths", default="both", choices=("even", "uneven", "both"))
    parser.add_argument("--slots", type=int, default=0, help="our conversations at a time; 0: all")
    parser.add_argument("--chunk", type=int, default=16, help="our tokens between two looks at which turns have ended")
    parser.add_argument("--no-torch", action="store_true", help="only the rollout here")


def run(args) -> list[dict]:
    # Both frameworks share the GPU: neither may take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from tapo_jax.bench import model, model_jax  # noqa: PLC0415 - jax starts its devices only after the line above

    size = size_of(args.size)
    ours = model_jax.random_model(size.config, size.dtype)
    there = None if args.no_torch else model.reference(ours, size)
    rows = []
    for lengths in ("even", "uneven"):
        if args.lengths in (lengths, "both"):
            work = work_of(args, size.config, uneven=lengths == "uneven")
            rows += compare(sides(args, ours, there, work), work, lengths, args.repeats)
    return rows


def size_of(name: str) -> Any:
    """Return the model of a size, as `bench/model.py` keeps them."""
    from tapo_jax.bench import model  # noqa: PLC0415 - see run

    size = model.SIZES["atlas" if name in ("tiny", "small") else name]
    # Tunix's Qwen3 has this base, whatever its config says.
    config = dataclasses.replace(size.config, rope_theta=1e6)
    if name == "small":
        small = dict(hidden=512, mlp=1536, layers=8, heads=8, kv_heads=4, head_dim=64, mrope_section=(12, 10, 10))
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, out=512), **small)
    return dataclasses.replace(size, config=config)


def work_of(args, config: Qwen3VLConfig, *, uneven: bool) -> Work:
    names = ("questions", "group", "turns", "question", "written", "response")
    return make_work(config, **{name: vars(args)[name] for name in names}, uneven=uneven)


def sides(args, model: Any, there: Any, work: Work) -> list[Side]:
    """Return the ways to play, ours first. there: the same weights in transformers, or None."""
    from tapo_jax.bench import rollout_ours  # noqa: PLC0415 - see run

    made: list[Side] = [rollout_ours.OurRollout(model, work, slots=args.slots or work.rows, chunk=args.chunk)]
    if there is not None:
        from tapo_jax.bench import rollout_torch  # noqa: PLC0415 - torch belongs to the test extra

        common = (there.model, work, forbidden(model.config))
        made += [rollout_torch.TransformersRollout(*common, copies=copies) for copies in (False, True)]
        # Tunix's models have no own table for the logits here, and its sampler reads text alone.
        if importlib.util.find_spec("tunix") is not None and model.config.tied:
            from tapo_jax.bench import rollout_tunix  # noqa: PLC0415 - of no extra

            made.append(rollout_tunix.TunixRollout(there.model.model, model.config, work, str(model.dtype)))
    return made


def compare(players: list[Side], work: Work, lengths: str, repeats: int) -> list[dict]:
    """Play the work on every side, in turns; return a row of each."""
    from tapo_jax.metrics import compile_count  # noqa: PLC0415 - see run

    def play(side: Side, temperature: float, seed: int) -> Played:
        found = side.play(temperature=temperature, seed=seed)
        print(f"{lengths}, round {seed} of {repeats}: {side.name} {found.seconds:.2f} s", file=sys.stderr, flush=True)
        return found

    greedy = [play(side, 0.0, 0) for side in players]
    for side in players:
        play(side, 1.0, 0)
    rounds: list[list[Played]] = [[] for _ in players]
    compiled = [0] * len(players)
    for seed in range(1, repeats + 1):
        for at, side in enumerate(players):
            before = compile_count()
            rounds[at].append(play(side, 1.0, seed))
            compiled[at] += compile_count() - before
    for side in players:
        side.close()
    rows = []
    for at, side in enumerate(players):
        first, pairs = at == 0, list(zip(rounds[at], rounds[0], strict=True))
        rows.append(
            {"lengths": lengths, "by": side.name}
            | numbers(rounds[at], work)
            | {
                "compiled": compiled[at],
                "agree": "" if first else f"{100 * agreement(greedy[0], greedy[at]):.1f} %",
                "times faster": "" if first else float(np.median([a.seconds / b.seconds for a, b in pairs])),
                "times less cpu": "" if first else float(np.median([a.cpu_s / b.cpu_s for a, b in pairs])),
            }
        )
    return rows


def numbers(played: list[Played], work: Work) -> dict[str, Any]:
    """Return the medians of the rounds of one side."""

    def middle(name: str) -> Any:
        values = [vars(one)[name] for one in played]
        return "" if None in values else float(np.median(values))

    rates = [work.total_written / one.seconds for one in played]
    return {
        "s": middle("seconds"),
        "cpu s": middle("cpu_s"),
        "prefill s": middle("prefill_s"),
        "decode s": middle("decode_s"),
        "written tokens/s": float(np.median(rates)),
        "prefilled/distinct": played[0].prefilled / work.distinct,
        "computed/prefilled": played[0].computed / played[0].prefilled,
        "idle": middle("idle"),
    }


def agreement(here: Played, there: Played) -> float:
    """Return the share of equal tokens; 0 where a side has written another number of them."""
    if [len(ids) for ids in here.written] != [len(ids) for ids in there.written]:
        return 0.0
    return float(np.mean(np.concatenate(here.written) == np.concatenate(there.written)))
