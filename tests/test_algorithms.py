"""The six algorithm configs, each for some steps of the little world, in a process with one device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from tapo_jax import records

ROOT = Path(__file__).parents[1]
NAMES = ("tapo_grpo", "tapo_gspo", "tapo_sapo", "grpo", "gspo", "sapo")
FEW = [(name, 6) for name in NAMES[:4]]
MANY = [pytest.param(name, 20, marks=pytest.mark.nightly) for name in NAMES]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("name", "steps"), [*FEW, *MANY])
def test_each_algorithm_trains(model, tmp_path, name, steps):
    """Every step logs TAPO's diagnostics; what it corrects moves advantages only where it is on."""
    fields = [f"total_steps={steps}", f"log.episodes_every={steps}", f"checkpoint.every={steps}", f"name={name}.py"]
    command = [sys.executable, str(ROOT / "tests" / "tiny_run.py"), str(tmp_path), str(model), *fields]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = records.read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(line["optimizer/skipped"] == 0 and np.isfinite(line["loss/total"]) for line in lines)
    assert sum(line["tapo/corrected_actions"] > 0 for line in lines) >= steps // 4
    assert sum(line["tapo/correctable_trajectories_at_0.7"] > 0 for line in lines) >= steps // 4
    turns = [turn for e in records.load(tmp_path / "episodes" / f"step_{steps:06d}.npz") for turn in e.turns]
    assert any(turn.adv_after != turn.adv_before for turn in turns) == name.startswith("tapo_")
