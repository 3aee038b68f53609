"""The program of the cold start: what it begins with, and that the same config gives the same weights."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from tapo_jax.atlas.play import Settings
from tapo_jax.cold_start import sft
from tapo_jax.cold_start.experts import Flaws
from tapo_jax.config import UserError, beside
from tapo_jax.data.sources import atlas_settings
from tapo_jax.models import hf, shipped

CONFIGS = str(Path(__file__).parents[1] / "configs" / "sft_atlas.py")


def get_config(arg=""):
    return beside(CONFIGS, "sft_atlas.py")(arg)


def weights(workdir: Path, folder: str = "export") -> str:
    return hashlib.sha256((workdir / folder / "model.safetensors").read_bytes()).hexdigest()


def short(config: ConfigDict) -> ConfigDict:
    """The config with two steps on sequences to copy alone, which need no vision tower."""
    config.total_steps, config.warmup_steps = 2, 1
    config.shapes.copy.update(rows=2, length=16)
    config.phases = (ConfigDict({"until": 2, "mixture": {"copy": 1.0}}),)
    return config


def test_the_stages_ask_what_the_runs_ask_and_their_expert_guesses():
    runs = atlas_settings(beside(CONFIGS, "tapo_grpo.py")("band"))
    band = get_config("band")
    assert band.start == "base" and band.base.start == "shipped"
    for config in (band, band.base):
        asked = Settings(**config.atlas)
        assert (asked.mix, asked.outlines, asked.hops) == (runs.mix, runs.outlines, runs.hops)
        assert asked.outline == runs.outline and 0 < Flaws(**config.flaws).guess < 1


def test_from_nothing_the_stages_follow_the_first_cold_start():
    config = get_config("band,nothing").base
    assert config.start == "base" and config.base.to_dict() == get_config("").to_dict()
    assert get_config("").start == "nothing" and Flaws(**get_config("").flaws) == Flaws()


def test_the_same_config_gives_the_same_weights_and_a_model_directory(tmp_path):
    for name in ("a", "b"):
        sft.run(short(get_config("band").base), str(tmp_path / name))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(shipped.DIRECTORY.parent, "atlas_tiny")
    assert hf.load(tmp_path / "a" / "export")[1] == hf.load(shipped.DIRECTORY)[1]
    files = [{path.name for path in place.iterdir()} for place in (tmp_path / "a" / "export", shipped.DIRECTORY)]
    assert files[0] == files[1]


def test_a_stage_begins_with_what_its_base_made(tmp_path):
    config = short(get_config("band"))
    config.base, config.lr = short(get_config("")), 1e-12  # the stage changes next to nothing
    sft.run(config, str(tmp_path))
    read = lambda folder: jax.tree.leaves(nnx.to_pure_dict(nnx.state(hf.load(folder)[0], nnx.Param)))  # noqa: E731
    base, stage, begun = (read(place) for place in (tmp_path / "base/export", tmp_path / "export", shipped.DIRECTORY))
    for made, after in zip(base, stage, strict=True):
        np.testing.assert_allclose(made, after, atol=1e-6)
    assert any(np.abs(made - before).max() > 0.01 for made, before in zip(base, begun, strict=True))


def test_a_run_shorter_than_its_warm_up_is_refused():
    with pytest.raises(UserError, match="steps=20: give more than the 50 steps of the warm-up"):
        get_config("steps=20")


def test_a_model_that_ships_is_named_by_its_name_and_another_name_is_a_directory():
    assert shipped.model_directory("") == shipped.DIRECTORY
    with pytest.raises(UserError, match="atlas_moon"):
        shipped.model_directory("atlas_moon")
