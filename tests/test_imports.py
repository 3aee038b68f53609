"""Who may import whom. A wrong edge here is how a codebase becomes one lump."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tapo_jax"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(file: str, *, at_once: bool = False) -> set[str]:
    """The modules that a file imports: "jax.sharding.Mesh" for `from jax.sharding import Mesh`. at_once: only what
    importing the file imports, not what a function imports when it is called."""
    found = set()
    tree = ast.parse((ROOT / file).read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(file: str) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def inside(file: str) -> set[str]:
    """The files of this package that a file imports directly and at once."""
    found = set()
    for name in imports(file, at_once=True):
        parts = name.split(".")
        paths = ("/".join(parts[:end]) for end in (len(parts), len(parts) - 1))
        files = (other for path in paths for other in (f"{path}.py", f"{path}/__init__.py") if other in FILES)
        found |= {next(files, file)} if parts[0] == "tapo_jax" else set()
    return found - {"tapo_jax/__init__.py", file}


def reached(file: str) -> set[str]:
    """The files that importing a file runs."""
    seen, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += inside(current)
    return seen


WALLS = [  # who may never reach whom, directly or through others
    ("the rollout knows nothing of learning", ["tapo_jax/rollout/rounds.py"], ["tapo_jax/learn/logprobs.py"]),
    ("the mesh knows no model", ["tapo_jax/sharding.py"], ["tapo_jax/models/"]),
    (
        "training does not know how the shipped weights were made",
        ["tapo_jax/train.py", "tapo_jax/agent.py"],
        ["tapo_jax/cold_start/tiny_model.py", "tapo_jax/cold_start/experts.py", "tapo_jax/cold_start/batches.py"],
    ),
    ("the world is below the rollout", ["tapo_jax/atlas/play.py"], ["tapo_jax/rollout/episode.py", "tapo_jax/inputs.py"]),
    ("reports read files", ["tapo_jax/report/results.py"], ["tapo_jax/models/", "tapo_jax/metrics.py"]),
]


@pytest.mark.parametrize("importers, forbidden", [wall[1:] for wall in WALLS], ids=[wall[0] for wall in WALLS])
def test_walls(importers, forbidden):
    for file in importers:
        crossed = {other for other in reached(file) if other.startswith(tuple(forbidden))}
        assert not crossed, f"{file} reaches {sorted(crossed)}"


def test_losses_and_advantages_are_functions_of_arrays():
    assert tops("tapo_jax/learn/losses.py") == {"jax"}
    assert tops("tapo_jax/learn/advantages.py") <= {"jax", "numpy"}
    for file in ("tapo_jax/learn/losses.py", "tapo_jax/learn/advantages.py"):
        assert inside(file) == set()


def test_tapo_needs_no_model_no_config_and_no_episode():
    for file in reached("tapo_jax/tapo/__init__.py"):
        assert file.startswith("tapo_jax/tapo/") or file == "tapo_jax/types.py", file
        assert not {"flax", "ml_collections"} & tops(file), file


@pytest.mark.parametrize(
    "file",
    [
        "tapo_jax/config.py",
        "tapo_jax/types.py",
        "tapo_jax/rollout/episode.py",
        "tapo_jax/rollout/chat.py",
        "tapo_jax/rewards.py",
        "tapo_jax/records.py",
        "tapo_jax/models/config.py",
        "tapo_jax/models/positions.py",
        "tapo_jax/models/image_processor.py",
        *(file for file in FILES if file.startswith("tapo_jax/tools/")),
    ],
)
def test_the_host_side_imports_no_jax(file):
    for other in reached(file):
        assert not {"jax", "jaxlib", "flax"} & tops(other), f"{file} runs {other}"


def test_configs_import_no_jax():
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert not {"jax", "flax", "optax"} & tops(path.relative_to(ROOT).as_posix()), path.name


def test_one_file_knows_partition_specs():
    """By the names in the code, since `jax.sharding.PartitionSpec` and `jax.P` need no import of their own."""
    users = []
    for file in FILES:
        names = {
            node.attr for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Attribute)
        }
        if {"PartitionSpec", "P"} & (names | {name.rsplit(".", 1)[-1] for name in imports(file)}):
            users.append(file)
    assert users == ["tapo_jax/sharding.py"]


def test_one_file_knows_the_names_in_safetensors_files():
    users = [file for file in FILES if "model.language_model" in (ROOT / file).read_text()]
    assert users == ["tapo_jax/models/hf.py"]


def test_the_sampler_knows_no_tools_and_no_text():
    assert not any(
        name.startswith(("tapo_jax.tools", "tapo_jax.rollout.chat", "tapo_jax.rollout.episode"))
        for name in imports("tapo_jax/rollout/sampler.py")
    )


def test_only_the_rollout_joins_device_and_tools():
    """Files that import both the sampler and the tools' runner: the rollout, and agent.py, which builds both."""
    both = [file for file in FILES if {"tapo_jax/rollout/sampler.py", "tapo_jax/tools/base.py"} <= inside(file)]
    assert set(both) <= {"tapo_jax/rollout/rounds.py", "tapo_jax/rollout/board.py", "tapo_jax/agent.py"}


def test_the_package_needs_no_tensorflow_and_no_torch():
    """One benchmark compares with PyTorch where that is installed; nothing else imports it at once."""
    users = {file for file in FILES if {"tensorflow", "torch"} & tops(file)}
    assert users <= {"tapo_jax/bench/model_torch.py"}
    assert not [file for file in FILES if users & inside(file)]


def test_there_are_no_import_cycles():
    for file in FILES:
        for other in inside(file):
            assert file not in reached(other) - ({file} if other == file else set()), f"{file} <-> {other}"
