"""The cold start of the tiny Atlas model: the format, where to look and how to copy names, with an expert's mistakes.

    python launch/sft.py --config=configs/sft_atlas.py --workdir=/tmp/atlas_sft

Takes about an hour on two idle cores. WORKDIR/export can replace tapo_jax/cold_start/atlas_tiny.

    python launch/sft.py --config=configs/sft_atlas.py:band --workdir=/tmp/band_sft
    python launch/sft.py --config=configs/sft_atlas.py:band,nothing --workdir=/tmp/band_sft

The cold start for questions that can also be guessed, `configs/tapo_grpo.py:band`: two stages of training after the
first cold start, with another expert. They begin with the weights that ship, or (`nothing`) make the first cold start
too. They take about ten minutes of one core.
WORKDIR/export can replace tapo_jax/cold_start/atlas_band. Arguments: `steps=…`, `seed=…`, `band`, `nothing`.
"""

from ml_collections import ConfigDict

from tapo_jax.config import UserError, beside, parse_arg

WARM_UP = 50


def get_config(arg: str = "") -> ConfigDict:
    a = parse_arg(arg, steps=0, seed=0, band=False, nothing=False)
    if 0 < a.steps <= WARM_UP:
        raise UserError(f"steps={a.steps}: give more than the {WARM_UP} steps of the warm-up.")
    return band(a.steps or 80, a.seed, a.nothing) if a.band else first(a.steps or 7000, a.seed)


def first(steps: int, seed: int) -> ConfigDict:
    c = ConfigDict()
    c.seed = seed
    c.start = "nothing"  # or "shipped", or "base": what the config `base` makes
    c.base = ConfigDict()
    c.total_steps = steps
    c.log_every = 25
    c.save_every = 250
    c.context_weight = 0.1  # loss weight of text that is read; written text has 1
    c.atlas = dict(hops=(1, 2), outlines=2, outline=(0.24, 0.36))
    c.flaws = dict()  # probabilities of the expert's mistakes that differ from those of experts.py
    # rows × tokens (× patches) of each batch kind
    c.shapes = dict(
        copy=dict(rows=32, length=64),
        text_part=dict(rows=20, length=136),
        find=dict(rows=16, patches=256),
        where=dict(rows=12, patches=256),
        full=dict(rows=10, length=400, patches=320),
    )
    c.phases = (  # until: the step at which the next one begins
        ConfigDict(dict(until=1000, mixture=dict(copy=0.3, text_part=0.4, find=0.3))),
        ConfigDict(dict(until=2500, mixture=dict(copy=0.05, text_part=0.15, find=0.5, where=0.2, full=0.1))),
        ConfigDict(dict(until=4000, mixture=dict(copy=0.03, text_part=0.1, find=0.1, where=0.52, full=0.25))),
        ConfigDict(dict(until=steps, mixture=dict(copy=0.02, text_part=0.1, where=0.33, full=0.55))),
    )
    c.lr, c.warmup_steps, c.vision_rate = 3e-3, WARM_UP, 0.4
    return c


def guessing(steps: int, seed: int, nothing: bool) -> ConfigDict:
    """Return the first stage: to guess in a part of the episodes, and the new questions."""
    c = first(steps, seed)
    c.start, c.base = ("base", first(7000, seed)) if nothing else ("shipped", ConfigDict())
    data = beside(__file__, "tapo_grpo.py")("band").data
    mix = tuple((kind, share) for kind, share in data.mix.items() if share > 0)
    c.atlas = dict(hops=data.hops, outlines=data.outlines, outline=data.outline, mix=mix)
    # The boxes are good, the decisions are not: it guesses, and it looks up the wrong thing.
    c.flaws = dict(guess=0.4, wrong_attribute=0.8, skip_zoom=0.3, wrong_outline=0.05, wrong_image=0.1, skip_hop=0.3)
    c.shapes.full.update(rows=6, length=464, patches=400)
    c.phases = (ConfigDict(dict(until=steps, mixture=dict(copy=0.05, text_part=0.25, full=0.7))),)
    c.lr = 1e-3
    return c


def band(steps: int, seed: int, nothing: bool) -> ConfigDict:
    """Return the second stage: the right look-ups too, mostly on text alone, where a batch has many of them."""
    c = guessing(400, seed, nothing)
    c.base = guessing(400, seed, nothing)
    c.start, c.total_steps = "base", steps
    c.flaws.update(guess=0.4, wrong_attribute=0.6, early_answer=0.05)
    c.phases = (ConfigDict(dict(until=steps, mixture=dict(text_part=0.6, full=0.4))),)
    c.lr, c.warmup_steps = 7e-4, 10
    return c
