"""Define the rows of all sweeps: a config file and the fields that differ from it. For `launch/sweep.py`; one run:

    python launch/train.py --config=configs/ablations.py:row=beta_0.4,seed=1 --workdir=/tmp/beta_0.4

A row's name means the same config in all sweeps, so sweeps that are run into one folder share their base rows.
`base`: the same config with TAPO off; `reference`: TAPO as published, from which the row differs in one thing. Both are
compared with the row, paired by seed. Arguments: `row=…`, `seed=…`, `steps=…`, `world=…` (a key of WORLDS),
`test` (takes seconds).
"""

from ml_collections import ConfigDict

from tapo_jax.config import UserError, beside, parse_arg

# Fields that all runs of a sweep share, whatever the row. One run takes minutes.
SETTING = {
    "total_steps": 30,
    "eval.prompts": 256,
    "eval.at_start": False,  # the cold start is the same in all rows
    "eval.at_end": True,
    "eval.every": 15,
    "checkpoint.every": 10,
    "checkpoint.keep": 1,
    "log.episodes_every": 40,
    "log.tensorboard": False,
    "train.warm_up": False,
}
# Worlds: argument of the row's config file, and what differs from SETTING in all rows. "open" is Atlas as it ships; in
# "band" questions can also be guessed, and its runs are long enough to see whether the tools are lost.
WORLDS = {
    "open": ("", {}),
    "band": ("band", {"total_steps": 100, "eval.every": 20, "eval.prompts": 512}),
}
TEST_SETTING = SETTING | {
    "total_steps": 2, "eval.prompts": 8, "eval.at_start": True, "checkpoint.every": 1, "log.episodes_every": 2,
}  # fmt: skip
TEST_SIZES = (32, 16)  # numbers of questions, whatever the row sets


def row(config: str, base: str = "", reference: str = "", fields: dict | None = None) -> dict:
    return {"config": config, "base": base, "reference": reference, "fields": fields or {}}


def changed(**tapo) -> dict:
    """Return the row of TAPO on GRPO with other fields of config.tapo."""
    fields = {f"tapo.{name}": value for name, value in tapo.items()}
    return row("tapo_grpo.py", "grpo", "tapo_grpo", fields)


def pair(name: str, fields: dict) -> dict:
    """Return the rows of GRPO and of TAPO on GRPO, both with other fields."""
    return {
        f"grpo_{name}": row("grpo.py", fields=fields),
        f"tapo_{name}": row("tapo_grpo.py", f"grpo_{name}", fields=fields),
    }


FEW = {"data.sizes": (64, 512)}  # so few training questions that each is asked every eighth step

ROWS = {
    "grpo": row("grpo.py"),
    "tapo_grpo": row("tapo_grpo.py", "grpo"),
    "gspo": row("gspo.py"),
    "tapo_gspo": row("tapo_gspo.py", "gspo"),
    "sapo": row("sapo.py"),
    "tapo_sapo": row("tapo_sapo.py", "sapo"),
    "beta_0.2": changed(beta=0.2),
    "beta_0.4": changed(beta=0.4),
    "beta_0.6": changed(beta=0.6),
    "beta_1.0": changed(beta=1.0),
    "beta_1.2": changed(beta=1.2),
    "theta_0.5": changed(theta=0.5),
    "theta_0.6": changed(theta=0.6),
    "theta_0.8": changed(theta=0.8),
    "theta_0.9": changed(theta=0.9),
    "exact_match": changed(theta=1.0),
    "no_support": changed(support=False),
    "no_clip": changed(clip=False),
    "shuffled": changed(control="shuffled"),
    "zero_tools": changed(control="zero_tools"),
    "gigpo": row("tapo_grpo.py", "grpo", "tapo_grpo", {"algorithm.credit": "gigpo"}),
    "cluster_leader": changed(cluster="leader"),
    "cluster_theta_0.5": changed(cluster_theta=0.5),
    "cluster_theta_0.9": changed(cluster_theta=0.9),
    "aggregate_max": changed(aggregate="max"),
    "aggregate_min": changed(aggregate="min"),
    "scope_batch": changed(scope="batch"),
    "adaptive_theta": changed(adaptive_theta=True),
    **pair("few", FEW),
    "memory": row("tapo_grpo.py", "grpo_few", "tapo_few", FEW | {"tapo.memory_steps": 16}),
    # The number of rollouts per step is the same (`get_config`): 16 questions × 4 and 4 × 16, instead of 8 × 8.
    **pair("group_4", {"rollout.group_size": 4}),
    **pair("group_16", {"rollout.group_size": 16}),
    # Learning rates other than the default's, 4e-4.
    **pair("lr_2e-4", {"optimizer.lr": 2e-4}),
    **pair("lr_8e-4", {"optimizer.lr": 8e-4}),
    # Look-ups of every question, in training and held out; the other rows mix 1 and 2.
    **pair("hops_1", {"data.hops": (1,)}),
    **pair("hops_2", {"data.hops": (2,)}),
    **pair("hops_3", {"data.hops": (3,)}),
    # One outline in a scene instead of two: a failure has more steps that were right (`report truth`).
    **pair("outlines_1", {"data.outlines": 1}),
    **pair("outlines_1_hops_2", {"data.outlines": 1, "data.hops": (2,)}),
}

BOTH = ("grpo", "tapo_grpo")
SWEEPS = {
    "main": (*BOTH, "gspo", "tapo_gspo", "sapo", "tapo_sapo"),
    "beta": (*BOTH, "beta_0.2", "beta_0.4", "beta_0.6", "beta_1.0", "beta_1.2"),
    "theta": (*BOTH, "theta_0.5", "theta_0.6", "theta_0.8", "theta_0.9", "exact_match"),
    "support": (*BOTH, "no_support"),
    "clip": (*BOTH, "no_clip"),
    "exact": (*BOTH, "exact_match"),
    "shuffled": (*BOTH, "shuffled"),
    "zero_tools": (*BOTH, "zero_tools"),
    "gigpo": (*BOTH, "gigpo"),
    "clustering": (*BOTH, "cluster_leader", "cluster_theta_0.5", "cluster_theta_0.9"),
    "aggregate": (*BOTH, "aggregate_max", "aggregate_min"),
    "scope": (*BOTH, "scope_batch"),
    "adaptive": (*BOTH, "adaptive_theta"),
    "memory": ("grpo_few", "tapo_few", "memory"),
    "group": (*BOTH, "grpo_group_4", "tapo_group_4", "grpo_group_16", "tapo_group_16"),
    "lr": (*BOTH, "grpo_lr_2e-4", "tapo_lr_2e-4", "grpo_lr_8e-4", "tapo_lr_8e-4"),
    "hops": ("grpo_hops_1", "tapo_hops_1", "grpo_hops_2", "tapo_hops_2", "grpo_hops_3", "tapo_hops_3"),
    "outlines": (*BOTH, "grpo_outlines_1", "tapo_outlines_1", "grpo_outlines_1_hops_2", "tapo_outlines_1_hops_2"),
    "pair": BOTH,
}


def get_config(arg: str = "") -> ConfigDict:
    a = parse_arg(arg, row="tapo_grpo", seed=0, steps=0, world="open", test=False)
    if a.row not in ROWS:
        raise UserError(f"Unknown row '{a.row}': the rows of configs/ablations.py are {', '.join(ROWS)}.")
    if a.world not in WORLDS:
        raise UserError(f"world={a.world}: the worlds of configs/ablations.py are {', '.join(WORLDS)}.")
    world, setting = WORLDS[a.world]
    given = [f"seed={a.seed}", *([world] if world else []), *(["test"] if a.test else [])]
    c = beside(__file__, ROWS[a.row]["config"])(",".join(given))
    rollouts = c.data.prompts_per_step * c.rollout.group_size
    for name, value in ((TEST_SETTING if a.test else SETTING | setting) | ROWS[a.row]["fields"]).items():
        section, _, field = name.rpartition(".")
        (c[section] if section else c)[field] = value
    c.data.prompts_per_step = rollouts // c.rollout.group_size
    if a.test:
        c.data.sizes = TEST_SIZES
    if a.steps:
        c.total_steps = a.steps
    return c
