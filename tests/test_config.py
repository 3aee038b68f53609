"""Arguments of config files, and how a mistake ends a program."""

import os
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


PROGRAM = """
import json, sys
from absl import flags
from ml_collections import config_flags
from tapo_jax.config import run_main
CONFIG = config_flags.DEFINE_config_file("config", None, "Config.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder.")
OUT = flags.DEFINE_string("out", "", "File.")
PAGE = flags.DEFINE_bool("page", False, "Page.")
def main(argv):
    c = CONFIG.value
    print(json.dumps([c.algorithm.importance_cap, c.algorithm.clip_dual, c.data.hops, c.tools.names, PAGE.value]), "…")
run_main(main)
"""


def ended(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, "--config=configs/tapo_grpo.py:test", *arguments]
    env = os.environ | {"PYTHONPATH": str(CONFIGS.parent)} | environment
    return subprocess.run(command, cwd=CONFIGS.parent, env=env, capture_output=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.tapo.support", "False"], "The word 'False' on the command line belongs to no flag"),
        (["--page", "False"], "The word 'False' on the command line belongs to no flag"),
        (["config.seed=5", "hello"], "The word 'config.seed=5' on the command line belongs to no flag"),
        (["--workdir="], "--workdir is empty (a variable that is not set?)"),
        (["--config.tapo.thета=1"], "A --config.… flag does not fit the config"),
        (["--config.tapo.other=None"], "A --config.… flag does not fit the config: there is no field tapo.other"),
    ],
)
def test_what_the_command_line_cannot_mean_is_one_sentence(arguments, says):
    found = ended(*arguments)
    assert found.returncode == 1 and found.stdout == b""
    assert found.stderr.decode().startswith(f"error: {says}") and found.stderr.count(b"\n") == 1, found.stderr.decode()


def test_none_single_values_and_lists_reach_the_config_on_any_terminal():
    arguments = ["--config.algorithm.importance_cap=None", "--config.algorithm.clip_dual=None", "--config.data.hops=1"]
    names = "--config.tools.names=['image_zoom_in_tool']"
    found = ended(*arguments, names, "--nopage", "--out=", PYTHONIOENCODING="ascii")
    assert found.stdout == b'[null, null, [1], ["image_zoom_in_tool"], false] ?\n', found.stderr.decode()


def test_every_program_of_launch_refuses_words():
    for path in (CONFIGS.parent / "launch").glob("*.py"):
        assert "    run_main(main)\n" in path.read_text(), path
