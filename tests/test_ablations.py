"""Every row of every sweep is a valid config that differs from its base and its reference in nothing but what it is
about."""

from pathlib import Path

import pytest

from tapo_jax import check
from tapo_jax.config import UserError, beside, flat

ABLATIONS = str(Path(__file__).parents[1] / "configs" / "ablations.py")
ROWS, SWEEPS, SETTING = (beside(ABLATIONS, "ablations.py", name) for name in ("ROWS", "SWEEPS", "SETTING"))
get_config = beside(ABLATIONS, "ablations.py")


def differing(one: str, other: str, arg: str = "") -> set[str]:
    a, b = (flat(get_config(f"row={row}{arg}")) for row in (one, other))
    assert a.keys() == b.keys()
    return {name for name in a if a[name] != b[name]}


@pytest.mark.parametrize("arg", ["", ",test"])
@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_valid_config_with_the_setting(name, arg):
    config = get_config(f"row={name},seed=3{arg}")
    complete = flat(beside(ABLATIONS, "tapo_grpo.py")("test" if arg else ""))
    check.check(config)
    assert flat(config).keys() == complete.keys()  # no field is misspelt
    check.check_rows(
        prompts=config.data.prompts_per_step, group_size=config.rollout.group_size, shards=1, processes=1,
        updates=config.train.updates_per_batch, micro_batches=config.train.micro_batches,
    )  # fmt: skip
    assert config.seed == 3
    assert config.data.prompts_per_step * config.rollout.group_size == (16 if arg else 64)
    if not arg:
        assert {field: flat(config)[field] for field in SETTING} == SETTING


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["base"]])
def test_a_base_is_the_same_with_tapo_off(name):
    base = ROWS[name]["base"]
    assert get_config(f"row={base}").algorithm.credit == "trajectory" != get_config(f"row={name}").algorithm.credit
    assert "algorithm.credit" in differing(name, base)
    assert all(field.startswith("tapo.") for field in differing(name, base) if field != "algorithm.credit")


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["reference"]])
def test_a_reference_differs_in_one_field(name):
    (field,) = differing(name, ROWS[name]["reference"])
    assert field.startswith(("tapo.", "algorithm.credit")) and field in ROWS[name]["fields"]


def test_every_sweep_holds_the_base_and_reference_of_its_rows_and_no_config_twice():
    for name, rows in SWEEPS.items():
        assert len(set(rows)) == len(rows)
        for row in rows:
            assert {ROWS[row]["base"], ROWS[row]["reference"]} - {""} <= set(rows), (name, row)
    configs = [str(sorted(flat(get_config(f"row={row}")).items())) for row in ROWS]
    assert len(set(configs)) == len(ROWS)
    assert {row for rows in SWEEPS.values() for row in rows} == set(ROWS)


def test_rows_of_a_family_ask_the_same_questions_in_the_same_order():
    """The order comes from the seed and data.*; the cold start from model.path."""
    for name, row in ROWS.items():
        for other in {row["base"], row["reference"]} - {""}:
            assert not {f for f in differing(name, other) if f.startswith(("data.", "model.", "rollout.", "eval."))}


def test_sweeps_that_the_evidence_needs():
    assert [get_config(f"row={row}").algorithm.loss for row in SWEEPS["main"]] == [
        "grpo", "grpo", "gspo", "gspo", "sapo", "sapo"
    ]  # fmt: skip
    betas = {get_config(f"row={row}").tapo.beta for row in SWEEPS["beta"]}
    assert betas == {0.2, 0.4, 0.6, 0.8, 1.0, 1.2}
    assert get_config("row=exact_match").tapo.theta == 1 and get_config("row=gigpo").algorithm.credit == "gigpo"
    assert [get_config(f"row={row}").rollout.group_size for row in SWEEPS["group"]] == [8, 8, 4, 4, 16, 16]


@pytest.mark.parametrize("name", ["grpo", "tapo_sapo", "group_4", "gigpo"])
def test_the_world_in_the_band_changes_the_questions_the_model_and_the_length_of_a_run_in_every_row(name):
    name = name if name in ROWS else f"grpo_{name}"
    open_world, band = (flat(get_config(f"row={name},world={world}")) for world in ("open", "band"))
    check.check(get_config(f"row={name},world=band"))
    changed = {field for field in band if band[field] != open_world[field]}
    assert changed >= {"model.path", "data.mix.open", "data.mix.position", "data.outlines", "total_steps"}
    assert all(field.startswith(("data.", "eval.")) for field in changed - {"model.path", "total_steps"})
    assert band["total_steps"] >= 100 and band["eval.every"] < band["total_steps"]


def test_an_unknown_world_is_named():
    with pytest.raises(UserError, match="world=moon: the worlds of configs/ablations.py are open, band"):
        get_config("row=grpo,world=moon")


def test_arguments():
    assert get_config("row=grpo,steps=7,seed=2").total_steps == 7
    with pytest.raises(UserError, match="Unknown row 'beta_9'"):
        get_config("row=beta_9")
