"""The search that looks at few passages finds, bit for bit, what scoring every passage finds."""

import bm25s
import numpy as np
import pytest

from tapo_jax.tools import passage_index
from tapo_jax.tools.postings import Postings, largest
from tapo_jax.tools.words import words


def zipf_passages(number, vocabulary, seed):
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(1, vocabulary + 1)
    length = draw.integers(0, 40, number)
    return [" ".join(f"w{word}" for word in draw.choice(vocabulary, n, p=share / share.sum())) for n in length]


def scored(plain, query, top_k):
    """All passages, scored by bm25s and sorted."""
    known = [word for word in words(query) if word in plain.vocab_dict]
    score = plain.get_scores(known) if known else np.zeros(plain.scores["num_docs"], np.float32)
    order = np.argsort(-score, kind="stable")[:top_k]
    return [(int(n), float(score[n])) for n in order if score[n] > 0]


def found(index, queries, top_k):
    ranked = index.ranked(queries, [top_k] * len(queries))
    return [[(int(n), float(s)) for n, s in zip(*one, strict=True)] for one in ranked]


@pytest.mark.parametrize(("number", "vocabulary"), [(1, 3), (40, 5), (700, 30), (3000, 2000)])
def test_the_best_passages_have_the_bits_of_a_full_scoring(number, vocabulary, monkeypatch):
    """Against bm25s, from passages that are counted in several pieces.

    Short queries and long ones, of frequent words, of rare ones and of both, with words that come twice.
    """
    monkeypatch.setattr(passage_index, "PIECE", 1000)
    passages = ["w0", *zipf_passages(number, vocabulary, 0)]
    index, plain = passage_index.build(passages), bm25s.BM25()
    plain.index([words(passage) for passage in passages], show_progress=False)
    draw = np.random.default_rng(1)
    queries = [" ".join(f"w{word}" for word in draw.integers(0, vocabulary, n)) for n in draw.integers(0, 9, 150)]
    queries += [" ".join(f"w{word}" for word in draw.zipf(1.5, n) - 1) for n in draw.integers(1, 30, 150)]
    for top_k in (1, 3, 100, number + 5):
        assert found(index, queries, top_k) == [scored(plain, query, top_k) for query in queries]


def test_passages_with_only_a_frequent_word_are_not_touched():
    """The rare word decides; of the frequent one's 10,000 entries only those of the rare word's passages are read."""
    index = passage_index.build([f"often {'rare' if i % 1000 == 0 else 'other'} {i}" for i in range(10_000)])
    postings, looked = index.postings, []
    entries, look_up = postings._entries, postings._look_up
    postings._look_up = lambda word, passage: looked.append(len(passage)) or look_up(word, passage)
    vocabulary, added = index.vocabulary, []
    scratch = postings._score_N

    class Watched(np.ndarray):
        def __setitem__(self, key, value):
            added.append(np.size(key))
            super().__setitem__(key, value)

    postings._score_N = scratch.view(Watched)
    best, _ = postings.best([vocabulary["often"], vocabulary["rare"]], 3)
    assert best.tolist() == [0, 1000, 2000]
    assert len(entries(vocabulary["often"])[0]) == 10_000 and max(added) == 10 and max(looked) <= 10
    assert not scratch.any()  # the next query begins with zeros


def test_words_without_a_passage_have_no_largest_entry():
    data, start = np.array([1, 3, 2], np.float32), np.array([0, 0, 2, 2, 3, 3])
    assert largest(data, start).tolist() == [0, 3, 0, 2, 0]
    postings = Postings(data, np.array([0, 2, 1]), start, largest(data, start), 3)
    assert postings.best([0, 2, 4], 3)[0].tolist() == [] and postings.best([1, 0], 1)[0].tolist() == [2]
    assert largest(np.zeros(0, np.float32), np.zeros(1, np.int64)).tolist() == []
