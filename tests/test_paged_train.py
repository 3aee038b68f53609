"""Whole runs whose rollouts have few pages: what they say of them, and that a stop changes nothing."""

import signal
from pathlib import Path

import docs_tables
import pytest
from test_train import finish, model, repeatable, start  # noqa: F401 - fixtures
from test_train_carry import CARRY, cache, undisturbed  # noqa: F401 - a fixture

# A conversation takes up to 7 pages; 8 slots would take 57.
FIELDS = (*CARRY, "total_steps=3", "eval.at_end=False", "rollout.page_size=16", "rollout.pages=20")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory, cache) -> Path:  # noqa: F811
    """The folder of a run that nothing disturbs."""
    return undisturbed(tmp_path_factory.mktemp("paged") / "run", model, cache, FIELDS)


def test_a_run_in_few_pages_counts_who_had_to_leave(whole):
    lines = repeatable(whole)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert docs_tables.undocumented(set().union(*lines) - {"step"}) == []
    assert docs_tables.missing(set(lines[0]), "`rollout.page_size > 0`") == []
    assert sum(line["rollout/evicted"] for line in lines) > 0
    assert all(line["rollout/evicted_tokens"] >= line["rollout/evicted"] for line in lines)
    assert lines[0]["loss/sampler_logp_difference"] < 1e-4  # what was computed anew is what it was


@pytest.mark.nightly
def test_a_run_in_few_pages_that_is_stopped_and_killed_writes_the_same_metrics(whole, start, cache, tmp_path):  # noqa: F811
    """SIGTERM in the first rollout, whose slots are saved with their pages, and SIGKILL in a later one."""
    broken = tmp_path / "broken"
    printed = finish(start(broken, *FIELDS, f"signal={int(signal.SIGTERM)}", "round=9", **cache), broken)
    assert "the same command goes on from there" in printed and "Traceback" not in printed
    killed = (f"signal={int(signal.SIGKILL)}", "round=20")
    finish(start(broken, *FIELDS, *killed, **cache), broken, -signal.SIGKILL)
    finish(start(broken, *FIELDS, **cache), broken)
    assert repeatable(broken) == repeatable(whole)
