"""The six algorithm configs, each for twenty steps of the little world."""

import numpy as np
import pytest
import tiny_run

from tapo_jax import metrics, records, train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", ["tapo_grpo", "tapo_gspo", "tapo_sapo", "grpo", "gspo", "sapo"])
def test_each_algorithm_trains_for_twenty_steps(model, tmp_path, monkeypatch, name):
    """Every step logs TAPO's diagnostics; what it corrects moves advantages only where it is on."""
    tiny_run.patch(monkeypatch.setattr)
    short = {"total_steps": 20, "log__episodes_every": 20, "checkpoint__every": 20}
    train.train(tiny_run.config(model, f"{name}.py", **short), tmp_path)
    lines = metrics.read(tmp_path / "metrics.jsonl")[1:]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(line["optimizer/skipped"] == 0 and np.isfinite(line["loss/total"]) for line in lines)
    assert sum(line["tapo/corrected_actions"] > 0 for line in lines) >= 5
    assert sum(line["tapo/correctable_trajectories_at_0.7"] > 0 for line in lines) >= 5
    turns = [turn for e in records.load(tmp_path / "episodes" / "step_000020.npz") for turn in e.turns]
    assert any(turn.adv_after != turn.adv_before for turn in turns) == name.startswith("tapo_")
