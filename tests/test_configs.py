"""Every config file can be read, is complete, and its variants differ from tapo_grpo in nothing but what they say."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tapo_jax import check
from tapo_jax.config import UserError, beside, flat

CONFIGS = sorted(path.name for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
ALGORITHMS = {
    "tapo_grpo.py": ("grpo", "tapo"), "tapo_gspo.py": ("gspo", "tapo"), "tapo_sapo.py": ("sapo", "tapo"),
    "grpo.py": ("grpo", "trajectory"), "gspo.py": ("gspo", "trajectory"), "sapo.py": ("sapo", "trajectory"),
}  # fmt: skip


def load(name: str, arg: str = "") -> ConfigDict:
    return beside(str(Path(__file__).parents[1] / "configs" / "x"), name)(arg)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("ablations.py", "recipes.py")])
def test_every_config_can_be_read_and_refuses_unknown_arguments(name):
    assert isinstance(load(name), ConfigDict)
    with pytest.raises(UserError, match="Unknown config argument 'nonsense'"):
        load(name, "nonsense=1")


@pytest.mark.parametrize("arg", ["", "test", "steps=3,seed=2"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_six_algorithms_pass_the_checks_and_differ_only_in_the_algorithm(name, arg):
    config, base = load(name, arg), load("tapo_grpo.py", arg)
    check.check(config)
    assert (config.algorithm.loss, config.algorithm.credit) == ALGORITHMS[name]
    changed = {field for field, value in flat(config).items() if flat(base)[field] != value}
    assert changed <= {"algorithm.loss", "algorithm.clip_low", "algorithm.clip_high", "algorithm.credit"}


def test_defaults_are_those_of_the_paper():
    """beta 0.8 is the published best; theta and alpha_min are this project's."""
    tapo = load("tapo_grpo.py").tapo
    assert (tapo.beta, tapo.theta, tapo.alpha_min, tapo.clip, tapo.support) == (0.8, 0.7, 0.25, True, True)


def test_the_recipe_for_qwen3_vl_4b_has_the_published_batch():
    """128 prompts × 8 rollouts, learning rate 1e-6."""
    config = load("tapo_grpo.py", "qwen3_vl_4b")
    check.check(config)
    assert (config.data.prompts_per_step, config.rollout.group_size, config.optimizer.lr) == (128, 8, 1e-6)


def test_arguments_reach_the_config():
    config = load("tapo_sapo.py", "steps=3,seed=5")
    assert (config.total_steps, config.seed) == (3, 5)
