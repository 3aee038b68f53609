"""Rows of any content: a question, or one sentence."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapo_jax.config import UserError
from tapo_jax.data import read
from tests import published

text = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["a.png", "../a.png", "/a.png", "<image>", "", "the", "x\x00", "[", '["x"]', "\ud83d", "https://x/a.png", "user"]
)
value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "jsonl": ("id", "question", "images", "answers", "hops", "image_search", "imagse"),
    "livevqa": ("sample_id", "query", "query_image", "gt_answer"),
    "mat_search": ("id", "question", "answer", "image_path"),
    "infoseek": ("data_id", "image_id", "question", "answer", "answer_eval"),
    "mars": ("id", "prompt", "image", "reward_model", "image_search_title_list", "image_search_thumbnail_list",
             "image_search_summary"),
}  # fmt: skip
GOOD = {
    "jsonl": {"question": "q?", "images": ["a.png"], "answers": ["x"], "image_search": {"titles": ["t"]}},
    "livevqa": {"sample_id": "s", "query": "q?", "query_image": "a.png", "gt_answer": "x"},
    "mat_search": {"id": 1, "question": "q?", "answer": ["x"], "image_path": "a.png"},
    "infoseek": {"data_id": "d", "image_id": "a", "question": "q?", "answer": ["x"], "answer_eval": ["y"]},
    "mars": {"prompt": [{"role": "user", "content": "<image>q?"}], "image": ["a.png"],
             "reward_model": {"ground_truth": ["x"]}},
}  # fmt: skip
SPLIT = {"jsonl": "x", "livevqa": "test", "mat_search": "test", "infoseek": "x", "mars": "x"}
FILE = {"jsonl": "x.jsonl", "livevqa": "qa.json", "mat_search": "MAT-Search.json", "infoseek": "x.jsonl",
        "mars": "x.jsonl"}  # fmt: skip


def attempt(folder, name: str, rows: list) -> list:
    """What a reader makes of rows; looks at every image too."""
    data = json.dumps(rows) if FILE[name].endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / FILE[name]).write_text(data)
    if name == "mars":
        (folder / "m.json").write_text(json.dumps({"x": {"annotation": "x.jsonl", "root": "."}}))
    prompts = list(read(name, folder, SPLIT[name]))
    for prompt in prompts:
        assert prompt.question.encode() and prompt.answers and prompt.id.encode()
        for n in range(len(prompt.images)):
            with contextlib.suppress(UserError):
                assert prompt.images[n].ndim == 3
    return prompts


@pytest.mark.parametrize("name", list(FIELDS))
def test_a_row_of_any_content_is_a_question_or_a_sentence(tmp_path, name):
    published.save(tmp_path / "a.png", 1)
    assert len(attempt(tmp_path, name, [GOOD[name]])) == 1, "else nothing is tried"

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.dictionaries(st.sampled_from(FIELDS[name]), value, max_size=2), st.integers(0, 3))
    def tried(changes, kind):
        rows = {0: [GOOD[name] | changes], 1: [changes], 2: [GOOD[name], GOOD[name] | changes], 3: [list(changes)]}
        with contextlib.suppress(UserError):
            attempt(tmp_path, name, rows[kind])

    tried()


@pytest.mark.parametrize("name", list(FIELDS))
def test_a_file_of_any_bytes_is_questions_or_a_sentence(tmp_path, name):
    published.save(tmp_path / "a.png", 1)
    attempt(tmp_path, name, [GOOD[name], GOOD[name] | {"id": "2"}])
    file = tmp_path / FILE[name]
    good = file.read_bytes()

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(good)), st.binary(max_size=6), st.integers(0, 40))
    def tried(at, inserted, removed):
        file.write_bytes(good[:at] + inserted + good[at + removed :])
        with contextlib.suppress(UserError):
            list(read(name, tmp_path, SPLIT[name]))

    tried()


def test_a_damaged_parquet_file_is_questions_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, rng = tmp_path / "fvqa_train.parquet", np.random.default_rng(0)
    published.parquet(file, [published.fvqa_row(i) for i in range(3)], published.fvqa_schema("published"))
    good = file.read_bytes()
    for _ in range(150):
        changed = bytearray(good)
        for at in rng.integers(0, len(good), 3):
            changed[at] = rng.integers(256)
        file.write_bytes(changed)
        with contextlib.suppress(UserError):
            for prompt in read("fvqa", tmp_path, "train"):
                assert prompt.images[0].ndim == 3
