"""Who may import whom. A wrong edge here is how a codebase becomes one lump.

A room is a package of tapo_jax or a file at its top. Imports that a function makes when it is called count too.
"""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tapo_jax"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))
WIRING = {"agent", "check", "evaluate", "one_step", "programs", "train"}


@functools.cache
def imports(file: str, *, at_once: bool = False) -> frozenset[str]:
    """The modules that a file imports: "jax.sharding.Mesh" for `from jax.sharding import Mesh`. at_once: only what
    importing the file imports, not what a function imports when it is called."""
    found = set()
    tree = ast.parse((ROOT / file).read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def tops(file: str) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


@functools.cache
def inside(file: str, *, at_once: bool = False) -> frozenset[str]:
    """The files of this package that a file names in its imports."""
    found = set()
    for name in imports(file, at_once=at_once):
        parts = name.split(".")
        paths = ("/".join(parts[:end]) for end in (len(parts), len(parts) - 1))
        files = (other for path in paths for other in (f"{path}.py", f"{path}/__init__.py") if other in FILES)
        found |= {next(files, file)} if parts[0] == "tapo_jax" else set()
    return frozenset(found - {"tapo_jax/__init__.py", file})


def reached(file: str) -> set[str]:
    """The files that importing a file runs, the `__init__` of every package on the way among them."""
    seen, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            parents = {f"{parent.as_posix()}/__init__.py" for parent in Path(current).parents if parent.name}
            waiting += inside(current, at_once=True) | (parents & set(FILES))
    return seen


def room(file: str) -> str:
    """ "learn" for tapo_jax/learn/losses.py, "train" for tapo_jax/train.py."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else Path(file).stem


def files_of(name: str) -> list[str]:
    return [file for file in FILES if room(file) == name]


def neighbours(name: str) -> set[str]:
    """The rooms that a room imports from, lazily or at once."""
    return {room(other) for file in files_of(name) for other in inside(file)} - {name}


ROOMS = sorted({room(file) for file in FILES} - {"__init__"})


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Every node that can come back to itself."""

    def after(node: str) -> set[str]:
        seen, waiting = set(), list(edges[node])
        while waiting:
            current = waiting.pop()
            if current not in seen:
                seen.add(current)
                waiting += edges[current]
        return seen

    return [node for node in edges if node in after(node)]


def test_there_are_no_import_circles_of_files():
    assert circles({file: set(inside(file)) for file in FILES}) == []


def test_there_are_no_import_circles_of_packages():
    assert circles({name: neighbours(name) for name in ROOMS}) == []


def test_the_circle_finder_finds_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


# room -> the rooms of this project that it may import, and no others.
VOCABULARY = {"config", "types", "batch"}
MAY_IMPORT = {
    "config": set(),
    "types": set(),
    "batch": set(),
    "sharding": {"config"},
    "processes": {"config", "records"},
    "tapo": {"types"},
    "models": VOCABULARY | {"sharding"},
    "tools": VOCABULARY,
    "atlas": VOCABULARY | {"tools"},
    "data": VOCABULARY | {"atlas", "models", "records", "rewards", "tools"},
    "rollout": VOCABULARY | {"models", "sharding", "tools"},
    "learn": VOCABULARY | {"models", "processes", "sharding", "tapo"},
    "rewards": {"config", "rollout", "types"},
    "records": {"config", "types"},
    "lab": {"config", "learn", "records", "report", "tapo"},
    "report": {"atlas", "config", "records", "types", "viewer"},
    "viewer": {"config", "records", "rollout", "types"},
    "sweep": {"config", "processes", "records", "report"},
}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_only_what_is_below_it(name):
    assert neighbours(name) <= MAY_IMPORT[name]


def test_training_does_not_know_how_the_shipped_weights_were_made():
    for name in WIRING:
        assert not {other for file in files_of(name) for other in reached(file) if room(other) == "cold_start"}


def test_only_the_wiring_and_whole_programs_know_the_config():
    """A config is an `ml_collections.ConfigDict`; packages take plain arguments. Programs of their own read one too."""
    programs = {
        "bench/model_jax.py",
        "cold_start/sft.py",
        "compile_check/check.py",
        "compile_check/programs.py",
        "sweep/runs.py",
    }
    users = {file for file in FILES if "ml_collections" in tops(file)}
    allowed = {file for name in WIRING | {"config"} for file in files_of(name)} | {
        f"tapo_jax/{file}" for file in programs
    }
    assert users <= allowed, users - allowed


def test_losses_and_advantages_are_functions_of_arrays():
    assert tops("tapo_jax/learn/losses.py") <= {"collections", "dataclasses", "jax"}
    assert tops("tapo_jax/learn/advantages.py") <= {"jax", "numpy"}
    for file in ("tapo_jax/learn/losses.py", "tapo_jax/learn/advantages.py"):
        assert inside(file) == set()


def test_tapo_needs_no_model_no_config_and_no_episode():
    for file in reached("tapo_jax/tapo/__init__.py"):
        assert not {"flax", "ml_collections"} & tops(file), file


@pytest.mark.parametrize(
    "file",
    [
        "tapo_jax/config.py",
        "tapo_jax/types.py",
        "tapo_jax/records.py",
        "tapo_jax/rollout/episode.py",
        "tapo_jax/rollout/chat.py",
        "tapo_jax/models/config.py",
        "tapo_jax/models/positions.py",
        "tapo_jax/models/image_processor.py",
        "tapo_jax/models/shipped.py",
        "tapo_jax/data/__main__.py",
        "tapo_jax/sweep/runs.py",
        *(file for file in FILES if room(file) in ("report", "rewards", "tools", "viewer")),
    ],
)
def test_the_host_side_imports_no_jax(file):
    for other in reached(file):
        assert not {"jax", "jaxlib", "flax"} & tops(other), f"{file} runs {other}"


def test_the_retrieval_service_runs_without_jax_and_its_accelerators():
    """bm25s imports jax where it is installed, and starts it: on a TPU host it would take the chips of the run."""
    assert "bm25s" in {top for file in reached("tapo_jax/tools/text_search.py") for top in tops(file)}
    service = ast.parse((ROOT / "launch" / "retrieval_server.py").read_text())
    modules = {node.module for node in ast.walk(service) if isinstance(node, ast.ImportFrom)}
    files = ["tapo_jax/data/corpus.py", "tapo_jax/tools/retrieval_service.py", "tapo_jax/tools/dense_index.py"]
    assert {file.removesuffix(".py").replace("/", ".") for file in files[:2]} <= modules
    for other in {other for file in [*files, "tapo_jax/tools/embeddings.py"] for other in reached(file)}:
        assert not {"bm25s", "jax", "jaxlib", "flax"} & tops(other), other


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
    for file in ("sampler", "slots", "schedule", "drawing", "generate"):
        known = {other for other in reached(f"tapo_jax/rollout/{file}.py") if room(other) == "tools"}
        assert not known | ({"tapo_jax/rollout/chat.py"} & reached(f"tapo_jax/rollout/{file}.py")), file


def test_only_the_rollout_joins_device_and_tools():
    """Files that import both the sampler and the tools' runner: the rollout, and agent.py, which builds both."""
    both = [file for file in FILES if {"tapo_jax/rollout/sampler.py", "tapo_jax/tools/base.py"} <= inside(file)]
    assert {room(file) for file in both} <= {"rollout", "agent"}


def test_the_package_needs_no_tensorflow_and_no_torch():
    """Two benchmarks compare with PyTorch, one with Tunix, where these are installed; nothing else imports them at
    once."""
    users = {file for file in FILES if {"tensorflow", "torch", "tunix"} & tops(file)}
    assert users <= {f"tapo_jax/bench/{name}.py" for name in ("model_torch", "rollout_torch", "rollout_tunix")}
    assert not [file for file in FILES if users & inside(file, at_once=True)]


def test_the_top_reads_as_a_list():
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 30


def functions(file: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)]


def parameters(function: ast.FunctionDef) -> int:
    """The parameters of a function, `self` and `cls` aside."""
    arguments = function.args
    names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("file", FILES)
def test_files_functions_and_signatures_stay_short(file):
    assert len((ROOT / file).read_text().splitlines()) <= 400
    for function in functions(file):
        assert function.end_lineno - function.lineno < 80, function.name
        assert function.name.startswith("_") or parameters(function) <= 8, function.name
