"""metrics.jsonl, the progress bar's line, clocks, and the count of compilations."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapo_jax import metrics, records


def write(folder, steps, resumed=None, total=9):
    writer = metrics.MetricWriter(folder, total_steps=total, resumed_step=resumed, tensorboard=False)
    for step in steps:
        writer.write(step, {"reward/mean": 0.5 + step, "loss/total": np.float32(1.5)})
    writer.close()


def test_one_json_line_a_step(tmp_path):
    write(tmp_path, [0, 1, 2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 1, "reward/mean": 1.5, "loss/total": 1.5}
    assert [line["step"] for line in lines] == [0, 1, 2]


def test_resuming_cuts_the_lines_after_the_checkpoint(tmp_path):
    write(tmp_path, [0, 1, 2, 3])
    write(tmp_path, [3, 4], resumed=2)
    assert [line["step"] for line in records.read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    write(tmp_path, [0], resumed=None)  # a run that was killed before its first checkpoint starts again
    assert [line["step"] for line in records.read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    write(tmp_path, [0, 1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [line["step"] for line in records.read_metrics(path)] == [0]
    write(tmp_path, [1, 2], resumed=1)
    assert [line["step"] for line in records.read_metrics(path)] == [0, 1, 2]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    """Python's reader would take the word NaN, others not, and max() hides it."""
    writer = metrics.MetricWriter(tmp_path, total_steps=1, resumed_step=None, tensorboard=False)
    writer.write(1, {"a": float("nan"), "b": float("inf"), "c": np.float32(2)})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 2.0}\n'


def test_tensorboard_gets_the_numbers(tmp_path):
    writer = metrics.MetricWriter(tmp_path, total_steps=1, resumed_step=None, tensorboard=True)
    writer.write(1, {"reward/mean": 0.25})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"reward/mean" in events.read_bytes()


def test_the_bars_line_has_reward_accuracy_speed_and_the_split_of_time():
    values = {
        "reward/mean": 0.61,
        "reward/accuracy": 0.42,
        "perf/tokens_per_s": 1234.0,
        "time/step": 10.0,
        "time/rollout": 6.0,
        "time/tool_wait": 0.5,
        "time/prefill": 2.0,
        "time/decode": 3.0,
        "time/logprobs": 1.0,
        "time/update": 2.5,
    }
    line = metrics.summary(values)
    assert "reward 0.610" in line and "accuracy 0.420" in line and "1234 tok/s" in line
    assert "rollout 60% tool_wait 5% prefill 20% decode 30% logprobs 10% update 25%" in line
    assert metrics.summary({}) == ""


def test_clocks_add_up_and_start_again():
    clock = metrics.Clock()
    for _ in range(2):
        with clock("work"):
            time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), clock("broken"):
        1 / 0  # noqa: B018
    taken = clock.take()
    assert taken["time/work"] >= 0.02 and "time/broken" in taken
    assert clock.take() == {}


def test_compilations_are_counted_once_a_program():
    double = jax.jit(lambda x: x * 2 + 1)
    x3, x4 = jnp.arange(3.0), jnp.arange(4.0)
    before = metrics.compile_count()
    double(x3)
    assert metrics.compile_count() - before == 1
    double(x3)
    assert metrics.compile_count() - before == 1
    double(x4)
    assert metrics.compile_count() - before == 2


def test_the_profiler_traces_the_steps_of_its_window(tmp_path):
    for step in range(1, 5):
        with metrics.profiling(step, (2, 3), tmp_path):
            jax.block_until_ready(jnp.ones(3) + step)
    assert [path.name for path in sorted((tmp_path / "process_0").iterdir())] == ["step_000002", "step_000003"]
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 2
    with metrics.profiling(1, (), tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()
