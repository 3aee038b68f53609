"""Arguments of config files, and how a mistake ends a program."""

import subprocess
import sys
from pathlib import Path

import pytest

from tapo_jax import config
from tapo_jax.config import UserError, parse_arg

CONFIGS = Path(__file__).parents[1] / "configs"


def test_parse_arg_takes_the_types_of_the_defaults():
    a = parse_arg("steps=20, lr=1e-3,test,name=x", steps=80, lr=0.5, test=False, name="", seed=3)
    assert (a.steps, a.lr, a.test, a.name, a.seed) == (20, 1e-3, True, "x", 3)
    assert parse_arg("", steps=80).steps == 80
    assert parse_arg("test=false", test=True).test is False


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("stesp=3", "Unknown config argument 'stesp': the arguments of this config are steps, test"),
        ("steps", "needs a value: write steps=80"),
        ("steps=many", "must be of type int, and 'many' is not"),
        ("test=perhaps", "is true or false, not 'perhaps'"),
    ],
)
def test_parse_arg_names_the_argument_and_the_way_out(arg, message):
    with pytest.raises(UserError, match=message):
        parse_arg(arg, steps=80, test=False)


def test_total_steps_from_epochs():
    """4,000 questions at 128 a step are 31.25 steps a pass."""
    assert config.total_steps(80, 0.0, 4000, 128) == 80
    assert config.total_steps(80, 2.0, 4000, 128) == 62
    assert config.total_steps(80, 0.001, 4000, 128) == 1


def test_beside_reads_another_config_of_the_folder():
    get_config = config.beside(str(CONFIGS / "gspo.py"), "tapo_grpo.py")
    assert get_config("steps=7").total_steps == 7


def test_run_main_prints_the_sentence_and_exits_1():
    program = "from tapo_jax.config import *\ndef main(argv): raise UserError('x is 3: set 4.')\nrun_main(main)"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=CONFIGS.parent, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (1, "error: x is 3: set 4.\n")


def test_config_imports_no_jax():
    program = "import sys, tapo_jax.config, tapo_jax.rollout.episode, tapo_jax.records\nassert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=CONFIGS.parent, check=False).returncode == 0
