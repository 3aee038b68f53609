"""Joining processes, and stopping at a whole step. What two processes compute together is in test_train.py."""

import os
import signal

import pytest

from tapo_jax import processes
from tapo_jax.config import UserError


def test_joining_needs_all_three_variables(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(
        UserError, match="JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID is set .* but JAX_NUM_PROCESSES is not"
    ):
        processes.join()


def test_a_machine_without_tpu_joins_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not processes.on_tpu_slice()
    processes.join()


def test_alone_everything_is_its_own():
    assert processes.any_of(True) is True and processes.any_of(False) is False
    assert processes.largest(3, 5) == (3, 5)
    assert processes.mean_over({"a": 1.5}) == {"a": 1.5}


def test_the_first_sigterm_is_noted_and_the_next_has_its_old_effect():
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append("old"))
    try:
        with processes.StopRequest() as request:
            assert not request.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.requested and caught == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == ["old"]
        with processes.StopRequest() as request:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert not request.requested and caught == ["old", "old"]
    finally:
        signal.signal(signal.SIGTERM, before)
