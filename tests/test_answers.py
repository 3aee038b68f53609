"""Answers of an evaluation as lines, their table by benchmark, and the paired comparison of two evaluations. No jax."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from tapo_jax.config import UserError
from tapo_jax.report import answers, benchmarks
from tapo_jax.report.__main__ import main
from tapo_jax.report.answers import Answer
from tapo_jax.report.compare import compare
from tapo_jax.report.statistics import mcnemar, paired_shares, pass_at, share_of_questions, wilson


def answer(question="q0", sample=0, right=0.0, **fields) -> Answer:
    usual = {
        "benchmark": "mmsearch", "asked": "ab", "answer": "Lima", "judged": True, "judge": "", "exact_match": right,
        "rewards": {"accuracy": right, "format": 1.0}, "reward": right + 0.5, "exact_match_published": right,
        "calls": {"zoom": 2}, "errors": {}, "turns": 3, "tokens": 90, "written": 40, "finish": "answer",
    }  # fmt: skip
    return Answer(**usual | {"question": question, "sample": sample} | fields)


def test_an_answer_is_read_as_it_was_written(tmp_path):
    """Any text of a policy or a judge stays on one line; a reward that is no number comes back as none."""
    odd = answer(
        "q1", answer='a"\u2028\n\ud83d {"x": 1}', judge="<judge>No</judge>\r\n", rewards={"accuracy": math.inf}
    )
    whole = [answer(), answer(answer=None, sample=1), odd]
    answers.write(tmp_path / "answers.jsonl", whole)
    assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == 3
    first, second, third = answers.read(tmp_path / "answers.jsonl")
    assert [first, second] == whole[:2] and (third.answer, third.judge) == (odd.answer, odd.judge)
    assert math.isnan(third.rewards["accuracy"]) and not third.right


def test_a_cut_line_is_no_answer_and_a_damaged_one_is_named(tmp_path, capsys):
    lines = [answers.line(answer(f"q{n}")) for n in range(3)]
    wrong = json.loads(lines[1]) | {"turns": True}
    path = tmp_path / "answers.jsonl"
    path.write_text(lines[0] + "{broken\n" + json.dumps(wrong) + "\n[1]\n" + lines[0] + lines[2][:-20])
    assert [one.question for one in answers.read(path)] == ["q0"]
    said = capsys.readouterr().err
    assert [f"line {n} is left out" in said for n in (1, 2, 3, 4, 5, 6)] == [False, True, True, True, False, False]
    assert answers.read(tmp_path / "nothing.jsonl") == []


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for count, right, k in [(5, 0, 2), (5, 2, 1), (5, 2, 3), (4, 4, 4), (6, 1, 4), (3, 3, 1)]:
        subsets = list(itertools.combinations(range(count), k))
        share = sum(min(subset) < right for subset in subsets) / len(subsets)
        assert pass_at(right, count, k) == pytest.approx(share)
    with pytest.raises(ValueError):
        pass_at(1, 2, 3)


def test_several_samples_are_worth_between_one_answer_and_all():
    """Samples that always agree add nothing; samples that vary as freely as answers of their own count in full."""
    assert share_of_questions([1.0, 0.0, 0.0, 1.0], 1) == wilson(2, 4)
    assert share_of_questions([1.0, 0.0, 0.0, 1.0], 8) == pytest.approx(wilson(2, 4))
    rng = np.random.default_rng(0)
    free = rng.binomial(8, 0.3, 500) / 8
    low, high = share_of_questions(free, 8)
    expected = wilson(free.mean() * 4000, 4000)
    assert high - low == pytest.approx(expected[1] - expected[0], rel=0.15)
    assert share_of_questions([1.0] * 10, 4) == wilson(10, 10)  # nothing tells whether samples agree
    assert share_of_questions([0.5] * 10, 4) == wilson(20, 40) and share_of_questions([], 4) == (0, 1)


def test_the_paired_interval_holds_the_difference_nineteen_times_of_twenty():
    """1,000 pairs of evaluations of 60 questions whose answers go together; the difference is 0.1."""
    rng = np.random.default_rng(1)
    p = np.array([0.35, 0.10, 0.20, 0.35])  # both, only the first, only the second, neither
    inside = [low <= 0.1 <= high for low, high in (paired_shares(*rng.multinomial(60, p)) for _ in range(1000))]
    assert 0.93 <= np.mean(inside) <= 0.975
    low, high = paired_shares(7, 3, 9, 5)
    assert paired_shares(7, 9, 3, 5) == pytest.approx((-high, -low))
    low, high = paired_shares(20, 0, 0, 0)
    assert low < 0 < high  # not empty where the two never differ
    assert mcnemar(0, 6) == pytest.approx(2 / 64) and mcnemar(0, 0) == 1.0


def two_benchmarks():
    """MMSearch: 3 questions × 2 samples, one not judged. LiveVQA: one question, with a failed service and a fault."""
    right = {("q0", 0): 1, ("q0", 1): 0, ("q1", 0): 1, ("q1", 1): 1, ("q2", 0): 0, ("q2", 1): 0}
    first = [answer(q, s, float(r), exact_match=float(r and s == 0)) for (q, s), r in right.items()]
    first[5] = dataclasses.replace(first[5], judged=False, judge="status 500", answer=None, finish="length")
    errors = {"timeout": 1, "bad_box": 2, "replay_miss": 1}
    return [*first, *(answer("l", s, benchmark="livevqa", errors=errors, calls={"zoom": 4}) for s in (0, 1))]


def test_a_row_holds_exact_match_and_judge_and_failures_of_services_apart():
    rows = benchmarks.rows(two_benchmarks(), judged=True)
    assert list(rows) == ["mmsearch", "livevqa"]
    one, other = rows["mmsearch"], rows["livevqa"]
    assert (one["questions"], one["answers"], one["samples"]) == (3, 6, 2)
    assert one["accuracy"] == one["judge"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert one["exact_match"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert one["exact_match_published"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert one["pass_at"] == {"1": pytest.approx(0.5), "2": pytest.approx(1.0)}  # q2 has one verdict: no pass@2
    assert (one["low"], one["high"]) == (one["accuracy_low"], one["accuracy_high"]) and one["low"] < 0.5 < one["high"]
    assert one["unjudged"] == pytest.approx(1 / 6) and one["answered"] == pytest.approx(5 / 6)
    assert one["finish"] == {"answer": pytest.approx(5 / 6), "length": pytest.approx(1 / 6)}
    assert (one["service_failures"], one["policy_faults"]) == (0, 0) and one["calls"] == {"zoom": 2.0}
    assert (other["service_failures"], other["policy_faults"], other["calls"]) == (2, 2, {"zoom": 4.0})
    json.dumps(rows, allow_nan=False)
    assert benchmarks.rows(two_benchmarks(), judged=False)["mmsearch"]["judge"] is None


def test_the_table_shows_both_rules_and_how_much_is_answered():
    text = benchmarks.table(benchmarks.rows(two_benchmarks(), judged=True), {"mmsearch": 171, "livevqa": 1})
    lines = text.splitlines()
    assert "mean@2 | pass@2" in lines[0]
    assert lines[2].startswith("| MMSearch | 3 of 171 | 33.3 % | 50.0 % | 50.0 % | 50.0 % |")
    assert lines[3].startswith("| LiveVQA | 1 | 0.0 % | 0.0 % | 0.0 % |")
    assert "timeout*" in text and "bad_box |" in text
    assert {line.count("|") for line in lines[:4]} == {11}
    odd = benchmarks.rows([answer(reward=math.nan)], judged=False)  # a reward of one's own that is no number
    assert odd["mmsearch"]["reward"] is None and json.dumps(odd, allow_nan=False)


def test_two_evaluations_are_compared_answer_by_answer(tmp_path, capsys):
    """A is right on q0 … q9 and B on q0 … q15, of 20; four questions of B are other ones under the same ids."""
    a = [answer(f"q{n}", right=float(n < 10)) for n in range(20)]
    b = [answer(f"q{n}", right=float(n < 16), asked="other" if n >= 16 else "ab") for n in range(20)]
    answers.write(tmp_path / "a" / "answers.jsonl", a)
    answers.write(tmp_path / "b" / "step_000010.jsonl", b[::-1])
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("| MMSearch | right |")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2:6] == ["16", "62.5 %", "100.0 %", "+37.5"] and cells[7:] == ["0", "6", "0.031"]
    low, high = (float(end) for end in cells[6].split(" – "))
    assert 0 < low < 37.5 < high
    assert "8 answers have no partner" in text


def test_samples_of_a_question_stay_together_in_a_comparison(tmp_path):
    """Ten questions of three samples; B is right once more on each of five questions: +1/6, by bootstrap."""
    a = [answer(f"q{n}", s, 0.0) for n in range(10) for s in range(3)]
    b = [answer(f"q{n}", s, float(n < 5 and s == 0)) for n in range(10) for s in range(3)]
    unjudged = [dataclasses.replace(b[0], question="q10", judged=False), answer("q10", judged=True)]
    answers.write(tmp_path / "a.jsonl", [*a, unjudged[1]])
    answers.write(tmp_path / "b.jsonl", [*b, unjudged[0]])
    text = compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    (line,) = [line for line in text.splitlines() if "| right |" in line]
    assert "| 10 | 0.0 % | 16.7 % | +16.7 |" in line and "| 0 | 5 | – |" in line
    assert "1 pairs have no verdict" in text


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    answers.write(tmp_path / "a.jsonl", [answer()])
    answers.write(tmp_path / "b.jsonl", [answer(asked="another")])
    (tmp_path / "empty").mkdir()
    for other, sentence in (("b.jsonl", "no question in common"), ("c", "does not exist"), ("empty", "no answers")):
        with pytest.raises(UserError, match=sentence):
            compare(tmp_path / "a.jsonl", tmp_path / other)
    answers.write(tmp_path / "empty" / "x.jsonl", [answer()])
    answers.write(tmp_path / "empty" / "y.jsonl", [answer()])
    with pytest.raises(UserError, match="several answer files"):
        compare(tmp_path / "a.jsonl", tmp_path / "empty")
