"""The verdict on each claim, from results with known numbers."""

import dataclasses

import pytest

from tapo_jax.config import flat
from tapo_jax.report import claims as report_claims
from tapo_jax.report.claims import FAILS, HOLDS, OPEN, decided
from tapo_jax.report.results import Result, Sweep, renamed


def result(row, seed, accuracy, *, entropy=0.2, correctable=0.6, share=0.0001, falls=0.0, loss="grpo", **tapo):
    fields = {"algorithm": {"loss": loss}, "tapo": {"enabled": True, "beta": 0.8, "theta": 0.7} | tapo}
    config = renamed(flat(fields))
    curves = {
        "loss/entropy": [[1, 0.5], [2, 0.4], [3, entropy]],
        "reward/accuracy": [[step, 0.5 - (falls if step > 6 else 0.0)] for step in range(12)],
        "tapo/correctable_trajectories_at_0.7": [[1, correctable], [2, correctable]],
    }
    evals = ((0, 0.0, 0.1), (10, 9.0, accuracy))
    return Result(row, seed, evals, curves, config, share if tapo.get("enabled", True) else 0.5)


def made(seeds=3, failed=(), **rows) -> Sweep:
    """Rows of keyword arguments; each seed's accuracy lies 0.01 above that of the seed before it."""
    results = {
        row: {
            seed: result(row, seed, accuracy + 0.01 * seed, **fields)
            for seed in range(seeds)
            if (row, seed) not in {(r, s) for r, s, _ in failed}
        }
        for row, (accuracy, fields) in rows.items()
    }
    reference = {row: "tapo" for row in rows if row not in ("grpo", "tapo")}
    return Sweep(results, failed, [], {row: "grpo" for row in rows if row != "grpo"}, reference)


def found(sweep: Sweep) -> dict[str, dict]:
    return {claim["claim"]: claim for claim in report_claims.claims(sweep, 10)}


OFF = {"enabled": False}


def test_the_rule():
    """0.1, 0.2, 0.3: Student's interval is 0.2 ± 0.248 and crosses 0, the bootstrap's does not."""
    assert decided([0.2, 0.21, 0.19])["verdict"] == HOLDS
    assert decided([-0.2, -0.21, -0.19])["verdict"] == FAILS
    assert decided([0.2, 0.21, 0.19], above=False)["verdict"] == FAILS
    assert decided([0.2, 0.21, 0.19], bound=0.5)["verdict"] == FAILS
    assert decided([0.1, 0.2, 0.3])["verdict"] == OPEN
    assert decided([0.2, 0.21])["verdict"] == OPEN  # two seeds decide nothing
    assert decided([]) is None


def test_gain_credit_dynamics_and_cost():
    claims = found(made(grpo=(0.2, OFF | {"entropy": 0.1, "correctable": 0.6}), tapo=(0.3, {})))
    gain = claims["TAPO improves grpo"]
    assert (gain["verdict"], gain["seeds"], gain["paper"]) == (HOLDS, 3, "+8.7 % relative")
    assert gain["mean"] == pytest.approx(0.1) and gain["relative"] == pytest.approx(0.1 / 0.21)
    assert claims["grpo: over half of the failing trajectories could be credited"]["verdict"] == HOLDS
    assert "grpo: over half of their tool calls could be credited" not in claims  # not logged
    entropy = claims["grpo: Entropy is higher at the end than without TAPO"]
    assert entropy["verdict"] == HOLDS and entropy["mean"] == pytest.approx(0.1)
    cost = claims["TAPO costs less than 0.06 % of the training time"]
    assert cost["verdict"] == HOLDS and cost["mean"] == pytest.approx(0.0001) and cost["rows"] == ["tapo"]
    assert not any("beta" in name for name in claims)


def test_the_area_under_the_held_out_curve_is_its_mean_over_steps():
    """0.1 to 0.3 over ten steps, then 0.3 to 0.5 over twenty: (10 · 0.2 + 20 · 0.4) / 30."""
    evals = ((0, 0.0, 0.1), (10, 9.0, 0.3), (30, 20.0, 0.5), (40, 30.0, 0.9))
    one = dataclasses.replace(result("tapo", 0, 0.3), evals=evals)
    assert report_claims.area(one, 30) == pytest.approx(1 / 3)
    assert report_claims.area(one, 9) is None
    claims = found(made(grpo=(0.2, OFF), tapo=(0.3, {})))
    gain = claims["TAPO improves grpo: area under the held-out curve"]  # half of the gain at the end
    assert gain["verdict"] == HOLDS and gain["mean"] == pytest.approx(0.05)


def test_a_gain_that_is_a_loss():
    claims = found(made(grpo=(0.3, OFF | {"correctable": 0.3}), tapo=(0.2, {"share": 0.01})))
    assert claims["TAPO improves grpo"]["verdict"] == FAILS
    assert claims["grpo: over half of the failing trajectories could be credited"]["verdict"] == FAILS
    assert claims["TAPO costs less than 0.06 % of the training time"]["verdict"] == FAILS


def test_betas():
    rows = {"grpo": (0.2, OFF), "tapo": (0.3, {}), "b2": (0.25, {"beta": 0.2}), "b12": (0.3, {"beta": 1.2})}
    claims = found(made(**rows))
    assert claims["grpo: all betas help"]["verdict"] == HOLDS
    assert [part["claim"] for part in claims["grpo: all betas help"]["parts"]] == ["beta 0.2", "beta 0.8", "beta 1.2"]
    best = claims["grpo: beta 0.8 is the best"]  # over 0.2, but not over 1.2
    assert [part["verdict"] for part in best["parts"]] == [HOLDS, OPEN] and best["verdict"] == OPEN
    worse = found(made(**rows | {"b2": (0.1, {"beta": 0.2})}))
    assert worse["grpo: all betas help"]["verdict"] == FAILS and worse["grpo: all betas help"]["mean"] < 0


def test_ablations_and_controls():
    claims = found(
        made(
            grpo=(0.2, OFF), tapo=(0.3, {}), no_support=(0.25, {"support": False}), exact=(0.35, {"theta": 1.0}),
            shuffled=(0.3, {"control": "shuffled"}),
        )
    )  # fmt: skip
    assert claims["Support helps (TAPO over TAPO without it)"]["verdict"] == HOLDS
    assert claims["TAPO beats exact matches alone"]["verdict"] == FAILS
    assert claims["TAPO beats shuffled witnesses"]["verdict"] == OPEN
    assert claims["TAPO beats shuffled witnesses"]["rows"] == ["tapo", "shuffled"]


def test_a_run_without_clip_that_failed_lost_everything():
    rows = {"grpo": (0.2, OFF), "tapo": (0.3, {}), "no_clip": (0.3, {"clip": False, "falls": 0.4})}
    name = "Without the clip training is unstable (accuracy falls further from its best)"
    steady = found(made(**rows))[name]
    assert steady["verdict"] == HOLDS and steady["mean"] == pytest.approx(0.4, abs=0.01)
    broken = found(made(failed=[("no_clip", 1, "not finite")], **rows))[name]
    assert broken["values"][1] == 1.0 and broken["seeds"] == 3


def test_markdown():
    text = "\n".join(report_claims.markdown(report_claims.claims(made(grpo=(0.2, OFF), tapo=(0.3, {})), 10)))
    numbers = "+10.0 [+10.0, +10.0] points, +47.6 % relative | 3 | +8.7 % relative"
    assert f"| TAPO improves grpo | **holds** | {numbers} |" in text
    assert report_claims.markdown([]) == []
