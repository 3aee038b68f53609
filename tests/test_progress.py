"""What a user is told within a step: how far a rollout is, and which process the others wait for."""

import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest
import rollout_world as world
import test_rollout
from ml_collections import ConfigDict
from test_train import finish, model, start  # noqa: F401 - fixtures

from tapo_jax import processes, train
from tapo_jax.metrics import Clock
from tapo_jax.rollout import episode
from tapo_jax.rollout.progress import Moment, ProgressLine

LINE = r"process 0, rollout: \d+ of 8 episodes after \d+ s, \d+ tokens/s, \d+ % of the slots idle"


def test_a_line_is_said_at_most_once_in_so_many_seconds_and_its_speed_is_that_since_the_last():
    said = []
    line = ProgressLine(said.append, 30.0)
    for second in range(1, 100):
        line(Moment(second, second // 2, 64, drawn=10 * second + (second > 60) * 300, steps=5 * second, slots=4))
    assert said == [
        "rollout: 15 of 64 episodes after 30 s, 10 tokens/s, 50 % of the slots idle",
        "rollout: 30 of 64 episodes after 60 s, 10 tokens/s, 50 % of the slots idle",
        "rollout: 45 of 64 episodes after 90 s, 20 tokens/s, 0 % of the slots idle",
    ]


def test_rollouts_that_are_shorter_say_nothing_and_each_begins_anew():
    said = []
    line = ProgressLine(said.append, 30.0)
    for seconds in (10.0, 29.0, 0.1, 20.0, 29.9, 0.1, 31.0, 0.1, 29.0, 30.5):
        line(Moment(seconds, 1, 2, 100, 100, 2))
    assert [text[:40] for text in said] == [
        "rollout: 1 of 2 episodes after 31 s, 3 t",
        "rollout: 1 of 2 episodes after 30 s, 3 t",
    ]
    ProgressLine(pytest.fail, 0.0)(Moment(1e6, 1, 2, 100, 100, 2))


def test_a_moment_without_a_decoding_step_has_no_idle_slots_to_tell():
    said = []
    ProgressLine(said.append, 1.0)(Moment(2.0, 0, 8, 0, 0, 4))
    assert said == ["rollout: 0 of 8 episodes after 2 s, 0 tokens/s"]


def test_a_rollout_tells_where_it_is_in_every_round_and_when_it_waits_for_tools(monkeypatch):
    moments = []
    monkeypatch.setattr(episode, "parse_turn", world.read_turn)
    runner = world.runner(world.Say(slow=0.2))
    episodes, _ = test_rollout.play(test_rollout.make_sampler(), runner=runner, watch=moments.append)
    rounds = [moment for moment in moments if not moment.in_tools]
    first, last = rounds[0], rounds[-1]
    assert (first.finished, first.drawn, first.steps) == (0, 0, 0) and len(rounds) > 3
    assert {moment.episodes for moment in moments} == {len(episodes)} and last.finished == len(episodes)
    assert last.drawn == sum(int(episode.mask_T.sum()) for episode in episodes)
    assert 0 < last.drawn <= last.steps * last.slots
    for one, after in itertools.pairwise(moments):
        assert one.seconds <= after.seconds and one.finished <= after.finished and one.steps <= after.steps
    assert 0 < sum(moment.in_tools for moment in moments) < len(rounds)


def test_a_clock_tells_what_begins_and_what_goes_on():
    told = []
    clock = Clock(told.append)
    with clock("step"):
        with clock("rollout"):
            pass
        with pytest.raises(ZeroDivisionError), clock("pack"):
            raise ZeroDivisionError
    assert told == ["step", "rollout", "step", "pack", "step", ""]
    assert set(clock.take()) == {"time/step", "time/rollout", "time/pack"}


def test_only_the_first_of_several_processes_prints_lines_and_all_of_them_note_where_they_are(monkeypatch, tmp_path):
    agent = types.SimpleNamespace(watched=lambda watch: watch)
    config = ConfigDict({"log": {"progress_s": 30.0, "late_s": 60.0}})
    for index, count, wanted in ((0, 1, ["rollout: 1"]), (0, 2, ["process 0, rollout: 1"]), (1, 2, [])):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        said = []
        watch, clock, heart = train.watched(agent, config, tmp_path, 4, said.append)
        clock.step = 5
        with clock("step"), clock("rollout"):
            watch(Moment(31.0, 1, 2, 100, 100, 2))
            came = heart._beat(0.0)
            watch(Moment(32.0, 1, 2, 100, 100, 2, in_tools=True))
            waits = heart._beat(0.0)
        assert (came.count, came.doing, came.step) == (3, "rollout", 5)
        assert (waits.count, waits.doing) == (3, "rollout, waiting for tools,")
        assert (heart._beat(0.0).count, heart._beat(0.0).doing) == (5, "metrics or checkpoint")
        assert [text[: len(wanted[0])] for text in said] == wanted


# The heartbeat.


@pytest.fixture
def heart(tmp_path, monkeypatch):
    """That of process 0 of 3, with what it has said."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    said = []
    made = processes.Heartbeat(tmp_path / "heartbeat", 60.0, said.append)
    made.said = said
    return made


def write(heart: processes.Heartbeat, process: int, count: int, age_s: float, number: int = 1, **fields) -> None:
    path = heart._path(process)
    path.parent.mkdir(exist_ok=True)
    beat = {"count": count, "doing": "rollout", "step": 7, "age_s": age_s, "host": f"host{process}", "number": number}
    path.write_text(json.dumps(beat | fields))


def test_nobody_is_late_while_all_are_at_the_same_place(heart):
    heart.come("update")
    write(heart, 1, 1, 500.0)
    write(heart, 2, 1, 500.0)
    heart._look(time.monotonic() + 500)
    assert heart.said == []


def test_the_late_process_is_named_with_its_place_once_in_so_many_seconds(heart, monkeypatch):
    heart.come("rollout")
    heart.come("update")
    write(heart, 1, 1, 80.0, doing="rollout, waiting for tools,")
    write(heart, 2, 2, 70.0)
    now = time.monotonic()
    monkeypatch.setattr(processes.time, "time", lambda: 1e9)
    heart._look(now)
    since = time.strftime("%H:%M:%S", time.localtime(1e9 - 80))
    words = "waiting for 1 of 3 processes for 70 s: process 1 (host1): rollout, waiting for tools, of step 7 since "
    assert heart.said == [words + since]
    write(heart, 1, 1, 120.0, number=2)
    heart._look(now + 40)
    assert len(heart.said) == 1
    heart._look(now + 61)
    assert len(heart.said) == 2 and "for 131 s" in heart.said[1]
    write(heart, 1, 2, 0.0, number=3)
    heart._look(now + 200)
    assert len(heart.said) == 2


def test_nothing_is_said_before_the_others_have_waited_so_long(heart):
    heart.come("update")
    write(heart, 1, 0, 300.0)
    write(heart, 2, 1, 59.0)
    now = time.monotonic()
    heart._look(now)
    assert heart.said == []
    heart._look(now + 2)
    assert "for 61 s: process 1" in heart.said[0]


def test_process_0_itself_may_be_the_late_one(heart):
    write(heart, 1, 4, 90.0)
    write(heart, 2, 4, 100.0)
    heart._look(time.monotonic())
    assert "for 100 s: process 0 (" in heart.said[0] and "start of step 0" in heart.said[0]


def test_a_process_without_a_sign_or_with_an_old_or_damaged_one_is_named_so(heart):
    heart.come("rollout")
    write(heart, 1, 0, 5.0)
    now = time.monotonic()
    heart._look(now)
    assert heart.said == []
    for damage in ("{", "[]", '{"count": "many"}', "\xff"):
        heart._path(2).write_text(damage, encoding="latin-1")
        heart._look(now)
    heart._look(now + 100)
    (said,) = heart.said
    assert "waiting for 2 of 3 processes" in said
    assert re.search(
        r"process 1 \(host1\): rollout of step 7 since [\d:]{8}, last sign 100 s ago; process 2 has given", said
    )


def test_alone_or_with_0_seconds_nothing_is_written(tmp_path, heart):
    alone = processes.Heartbeat(tmp_path / "other", 60.0, pytest.fail)
    alone._processes = 1
    never = processes.Heartbeat(tmp_path / "other", 0.0, pytest.fail)
    for one in (alone, never):
        with one.beating():
            one.come("rollout")
            assert not [thread.name for thread in processes.threading.enumerate() if thread.name == "heartbeat"]
    assert not (tmp_path / "other").exists()


def test_two_processes_say_which_one_is_late(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = Path(__file__).with_name("heartbeat_process.py")
    command = [sys.executable, str(program), port]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "heartbeat")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=300)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], first + second
    said = re.findall("said: (.*)", first)
    assert said and "said" not in second
    pattern = rf"waiting for 1 of 2 processes for \d s: process 1 \({re.escape(socket.gethostname())}\): "
    assert all(re.match(pattern + "rollout, waiting for tools, of step 2 since ", text) for text in said)
    assert not (tmp_path / "heartbeat").exists()


@pytest.mark.nightly
def test_a_run_of_two_processes_prints_its_progress_and_names_one_that_is_frozen(start, tmp_path):  # noqa: F811
    """Process 1 stops itself in the middle of a rollout until process 0 has said that it waits for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workdir, started = tmp_path / "two", []
    fields = ("total_steps=2", "eval.at_start=False", "eval.at_end=False", "log.progress_s=1e-3", "log.late_s=1.0")
    for rank, more in (("0", ()), ("1", (f"signal={int(signal.SIGSTOP)}", "round=6"))):
        environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": rank}
        started.append(start(workdir, *fields, *more, devices=2, **environment))
    log, until = Path(f"{workdir}.log"), time.monotonic() + 600
    while "last sign" not in log.read_text() and started[0].poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    started[1].send_signal(signal.SIGCONT)
    for process in started:
        printed = finish(process, workdir)
    late = r"waiting for 1 of 2 processes for \d+ s: process 1 .*rollout.* of step \d since .*, last sign"
    assert re.search(late, printed) and re.search(LINE, printed) and "process 1, rollout" not in printed
    assert not (workdir / "heartbeat").exists()
