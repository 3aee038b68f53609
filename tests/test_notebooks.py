"""The notebooks are thin, are stored without outputs, and run from end to end."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(name: str, tmp_path: Path, **parameters):
    """The executed notebook; `parameters` take the place of those of its cell with this tag. One device, as in a
    fresh runtime."""
    notebook = nbformat.read(ROOT / "colab" / name, as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    assert parameters.keys() <= {name.strip() for name in notebook.cells[place].source.split("=")[0].split(",")}
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XDG_CACHE_HOME": str(tmp_path)}
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as in a notebook
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources)
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # the notebook finds the repository above its folder
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    return client.execute(env=environment)


def printed(notebook) -> str:
    """What the cells printed, and the plain text of what they displayed."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def figures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


def test_there_are_four():
    names = ["ablations.ipynb", "credit_by_hand.ipynb", "walk_one_episode.ipynb", "when_does_tapo_help.ipynb"]
    assert [path.name for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin_and_has_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    assert len(lines) < 90
    assert not [line for line in lines if line.lstrip().startswith(("def ", "async def ", "class "))]
    assert "lambda" not in "".join(lines)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(notebook))
    assert "find_spec" in code_cells(notebook)[0].source
    assert max(len(line) for line in lines) <= 120


def test_credit_by_hand(tmp_path):
    """g2 did the successes' zoom, g3 their search: one correction each. A theta of 1 leaves none."""
    notebook = execute("credit_by_hand.ipynb", tmp_path)
    text = printed(notebook)
    assert figures(notebook) == 2
    assert text.count("corrected") == 2 and text.count("witness") == 4


def test_walk_one_episode(tmp_path):
    notebook = execute("walk_one_episode.ipynb", tmp_path, ARG="test")
    text = printed(notebook)
    assert figures(notebook) >= 2  # the question, the packed row, and what the tools returned
    assert "── turn 0, tokens" in text and "ended by:" in text and "accuracy" in text


def test_ablations(tmp_path):
    """Two rows of one seed, by the shipped programs."""
    out = tmp_path / "sweep"
    notebook = execute("ablations.ipynb", tmp_path, SEEDS="0", ARG="test,steps=1", OUT=str(out))
    text = printed(notebook)
    assert figures(notebook) >= 4
    assert "2 done, 0 failed, 0 waiting" in text and "TAPO improves grpo" in text
    results = [json.loads((out / row / "seed_0" / "result.json").read_text()) for row in ("grpo", "tapo_grpo")]
    assert [result["config"]["algorithm.credit"] for result in results] == ["trajectory", "tapo"]
    assert results[0]["evals"][0] == results[1]["evals"][0]  # the same cold start on the same questions
    assert results[0]["model"] == results[1]["model"]


def test_when_does_tapo_help(tmp_path):
    """Both borders of the closed form, the curves of one world and a phase diagram."""
    notebook = execute("when_does_tapo_help.ipynb", tmp_path, SEEDS=4, UPDATES=20)
    text = printed(notebook)
    assert figures(notebook) == 2
    assert "GRPO pushes tools at least as hard as guesses from p_t = 0.30" in text
    assert "half-way after" in text
