"""The cold start of the tiny Atlas model: the format, where to look and how to copy names, with an expert's mistakes.

    python launch/sft.py --config=configs/sft_atlas.py --workdir=/tmp/atlas_sft

Takes about an hour on two idle cores. WORKDIR/export can replace tapo_jax/cold_start/atlas_tiny.
Arguments: `steps=…`, `seed=…`.
"""

from ml_collections import ConfigDict

from tapo_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    a = parse_arg(arg, steps=7000, seed=0)
    c = ConfigDict()
    c.seed = a.seed
    c.total_steps = a.steps
    c.log_every = 25
    c.save_every = 250
    c.context_weight = 0.1  # loss weight of text that is read; written text has 1
    c.atlas = dict(hops=(1, 2), outlines=2, outline=(0.24, 0.36))
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
        ConfigDict(dict(until=a.steps, mixture=dict(copy=0.02, text_part=0.1, where=0.33, full=0.55))),
    )
    c.lr, c.warmup_steps, c.vision_rate = 3e-3, 50, 0.4
    return c
