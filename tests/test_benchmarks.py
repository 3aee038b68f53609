"""The published benchmarks in one run, killed in the middle and started again, with a judge that fails at times."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import benchmarks_process
import pytest
import tiny_run
from test_judge import said, served

from tapo_jax.config import UserError
from tapo_jax.evaluate import asking, benchmarks, checkpoint
from tapo_jax.report import answers
from tapo_jax.types import Prompt

KEY = "sk-planted-91c4"


def replies(number, body):
    """The judge says yes to g3, and has no verdict on g0."""
    text = re.search(r"Response: (\w+)", body["messages"][1]["content"][-1]["text"])[1]
    return (400, {}, KEY) if text == "g0" else said("Yes" if text == "g3" else "No")


def evaluated(tmp_path: Path, out: str, judge: str, *words: str) -> subprocess.CompletedProcess:
    program = Path(benchmarks_process.__file__)
    environment = os.environ | {
        "PYTHONPATH": str(program.parents[1]),
        "JUDGE_API_KEY": KEY,
        "JAX_NUM_CPU_DEVICES": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(program), *(str(tmp_path / name) for name in ("data", "model", out)), judge, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def tables(out: Path) -> tuple[dict, str, list]:
    return (
        json.loads((out / "benchmarks.json").read_text())["benchmarks"],
        (out / "benchmarks.md").read_text(),
        answers.read(out / "answers.jsonl"),
    )


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_table(tmp_path):
    benchmarks_process.write_data(tmp_path / "data")
    tiny_run.write_model(tmp_path / "model")
    with served(replies) as (judge, bodies):
        whole = evaluated(tmp_path, "whole", judge, "0")
        assert whole.returncode == 0, whole.stderr
        killed = evaluated(tmp_path, "killed", judge, "9")
        assert killed.returncode == -9
        kept = answers.read(tmp_path / "killed" / "answers.jsonl")
        assert len(kept) == 9 and not (tmp_path / "killed" / "benchmarks.json").exists()
        with open(tmp_path / "killed" / "answers.jsonl", "a") as file:
            file.write(answers.line(kept[0])[:40])  # a line that the kill cut short
        resumed = evaluated(tmp_path, "killed", judge, "0", "mmsearch/m1", "hr_1")
        assert resumed.returncode == 0, resumed.stderr
    assert int(whole.stdout.splitlines()[-1]) == 28 and int(resumed.stdout.splitlines()[-1]) == 19
    rows, text, found = tables(tmp_path / "whole")
    assert tables(tmp_path / "killed") == (rows, text, found)
    assert all(one in found for one in kept)
    assert "28/28" in whole.stderr.replace(" ", "")  # the progress bar
    check_rows(rows, found)
    page = (tmp_path / "killed" / "episodes.html").read_text()
    assert "mmsearch/m1" in page and "hr_mmsearch/hr_1" in page and "mmsearch/m3" not in page
    assert "was answered otherwise" not in resumed.stderr
    assert KEY not in json.dumps(bodies) and len(bodies) > 10
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "killed" / "evaluation.json" in files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in whole.stdout + whole.stderr + resumed.stdout + resumed.stderr


def check_rows(rows, found):
    """Every number of the table, from the answers and what the judge says of them."""
    assert tuple(rows) == benchmarks_process.NAMES
    for name, row in rows.items():
        mine = [one for one in found if one.benchmark == name]
        assert [one.sample for one in mine] == [0, 1, 0, 1] and (row["questions"], row["samples"]) == (2, 2)
        assert row["left_out"] == 0 and row["low"] <= row["high"] and row["judge"] == row["accuracy"]
        assert row["exact_match"] == sum(one.exact_match for one in mine) / 4
        assert row["unjudged"] == sum(one.answer == "g0" and not one.exact_match for one in mine) / 4
        assert row["tokens"] == sum(one.tokens for one in mine) / 4
        assert sum(row["finish"].values()) == pytest.approx(1) and set(row["pass_at"]) == {"1", "2"}
    for one in found:
        assert one.judged == (one.answer != "g0" or one.exact_match == 1)
        assert one.right == (one.exact_match == 1 or one.answer == "g3")
        assert ("<judge>" in one.judge) == (one.judged and one.answer is not None and not one.exact_match)
    assert {"exact", "judge", "unjudged"} <= {
        "exact" if one.exact_match else "judge" if one.right else "" if one.judged else "unjudged" for one in found
    }
    assert len({one.answer for one in found}) > 3 and any(one.calls for one in found)


def planned(tmp_path):
    benchmarks_process.write_data(tmp_path / "data")
    config = benchmarks_process.config(tmp_path / "data", tiny_run.write_model(tmp_path / "model"), "")
    return config, str(tmp_path / "model")


def test_what_cannot_be_evaluated_is_one_sentence_before_anything_is_compiled(tmp_path, monkeypatch):
    config, model = planned(tmp_path)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("it went on"))
    for options, sentence in (
        ({"page": True}, "give both flags"),
        ({"questions": ("hr_1",)}, "give both flags"),
        ({"page": True, "questions": ("nobody",)}, "'nobody', which is asked by no benchmark"),
    ):
        with pytest.raises(UserError, match=sentence):
            checkpoint.run(config, model, str(tmp_path / "out"), **options)
    config.benchmarks.livevqa = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"benchmarks\.livevqa: .*nowhere"):
        checkpoint.run(config, model, str(tmp_path / "out"))
    config.benchmarks.update(dict.fromkeys(benchmarks_process.NAMES, ""))
    config.eval.prompts = 0
    with pytest.raises(UserError, match=r"--samples and --questions are for benchmarks"):
        checkpoint.run(config, model, str(tmp_path / "out"), samples=2)
    monkeypatch.setattr(checkpoint.evaluate, "split_prompts", lambda config: [])
    with pytest.raises(UserError, match=r"give the folder of a benchmark \(--config.benchmarks.NAME=DIR\)"):
        checkpoint.run(config, model, str(tmp_path / "out"))


def test_answers_of_another_evaluation_or_of_other_data_are_never_mixed_or_overwritten(tmp_path):
    config, model = planned(tmp_path)
    questions, out = benchmarks.questions_of(config), tmp_path / "out"
    settings = benchmarks.settings_of(config, Path(model), 1)
    assert benchmarks._agreed(out, questions, settings) == dict.fromkeys(benchmarks_process.NAMES, 2)
    config.rollout.slots = 2  # how it is computed may change
    assert benchmarks.settings_of(config, Path(model), 1) == settings
    for field, value in (("eval.top_k", 5), ("rollout.max_turns", 2), ("tools.zoom_size", 99), ("seed", 8)):
        config.update_from_flattened_dict({field: value})
        changed = benchmarks.settings_of(config, Path(model), 1)
        with pytest.raises(UserError, match=rf"whose {field} is .*, not {value}: give another --out"):
            benchmarks._agreed(out, questions, changed)
        config.update_from_flattened_dict({field: settings[field]})
    # Fewer benchmarks, and then more, in the same folder: what is there stays.
    assert benchmarks._agreed(out, questions[:2], settings)["livevqa"] == 2
    other = [asking.Question("mmsearch", Prompt("m1", "another question?", (), ("g1",))), *questions[1:]]
    line = answers.Answer(
        "mmsearch", "m1", 0, questions[0].asked, "g1", True, "", {"accuracy": 1.0}, 1.0, 1.0, 1.0, {}, {}, 1, 9, 5, ""
    )
    answers.write(out / "answers.jsonl", [line])
    with pytest.raises(UserError, match="another question 'm1' of mmsearch"):
        benchmarks._agreed(out, other, settings)
    assert benchmarks._agreed(out, questions, settings)["mmsearch"] == 2


def test_the_random_keys_of_a_question_do_not_depend_on_what_else_is_asked(tmp_path):
    config, _ = planned(tmp_path)
    questions = benchmarks.questions_of(config)
    assert len({question.key for question in questions}) == len(questions) == 14
    assert all(0 <= question.key < 2**31 for question in questions)
    config.benchmarks.update(mmsearch="", limit=1)
    fewer, whole = (
        {(q.benchmark, q.prompt.id): q.key for q in some} for some in (benchmarks.questions_of(config), questions)
    )
    assert len(fewer) == 6 and fewer.items() <= whole.items()
    done = {("hr_mmsearch", "hr_0", 1)}
    assert asking.starts_of(questions[2:4], 2, done) == [(0, 0), (1, 0), (1, 1)]


def test_processes_share_the_questions_and_each_is_asked_once(tmp_path, monkeypatch):
    config, _ = planned(tmp_path)
    questions, shares = benchmarks.questions_of(config), []
    monkeypatch.setattr(asking.jax, "process_count", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(asking.jax, "process_index", lambda rank=rank: rank)
        shares.append(asking.my_share(questions))
    assert [question for share in shares for question in share] == questions
    assert {len(share) for share in shares} <= {4, 5}
