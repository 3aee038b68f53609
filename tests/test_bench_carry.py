"""The benchmark of carried groups plays all groups on every side, and its table adds up."""

import dataclasses
import json

import rollout_world as world

from tapo_jax.bench import __main__ as bench
from tapo_jax.bench import carry, model


def test_the_command_measures_both_ways_of_waiting_with_and_without_carry(tmp_path, capsys, monkeypatch):
    toy = dataclasses.replace(model.SIZES["atlas"], config=world.config())
    monkeypatch.setattr(carry, "size_of", lambda name: toy)
    monkeypatch.setattr("tapo_jax.bench.model_jax.random_model", lambda config, dtype: world.model())
    sizes = ["--steps=3", "--questions=2", "--group=2", "--carry", "1", "--tool=0.002", "--slow=0.2", "--repeats=1"]
    bench.main(["carry", *sizes, f"--out={tmp_path / 'carry.json'}"])
    rows = json.loads((tmp_path / "carry.json").read_text())["rows"]
    assert [(row["waits"], row["carry"]) for row in rows] == [("all", 0), ("all", 1), ("none", 0), ("none", 1)]
    assert all(row["recomputed"] == row["stale"] == 0 for row in rows if not row["carry"])
    assert rows[1]["recomputed"] > 0 and 0 < rows[1]["stale"] <= 2  # that of "none" depends on the clock
    assert all(0 <= row["idle"] < 1 and 0 <= row["tool wait"] < 1 and row["s"] > 0 for row in rows)
    assert "times faster" in capsys.readouterr().out


def test_the_same_share_of_calls_is_slow_in_every_rollout():
    work = carry.make_work(
        world.config(), questions=40, group=5, turns=4, question=8, written=4, response=4, uneven=True
    )
    one, two = (carry.SlowLookUp(work, tool_s=0.1, slow=0.25, times=20.0) for _ in range(2))
    seconds = [s for row in one.seconds for s in row]
    assert one.seconds == two.seconds and set(seconds) == {0.1, 2.0}
    assert 0.15 < seconds.count(2.0) / len(seconds) < 0.35
