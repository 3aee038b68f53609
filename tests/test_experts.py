"""Scripted experts: right without flaws, often wrong with them, and always through the real tools."""

import dataclasses
import itertools

import numpy as np
import pytest

from tapo_jax import rewards
from tapo_jax.atlas import closed
from tapo_jax.atlas.play import Settings
from tapo_jax.cold_start import tiny_model
from tapo_jax.cold_start.batches import ColdStart
from tapo_jax.cold_start.experts import Flaws
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.rollout.chat import Chat
from tapo_jax.types import TEXT_SEARCH

NONE = Flaws(**{field.name: 0.0 for field in dataclasses.fields(Flaws)})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts")
    tiny_model.write_files(path, tiny_model.train_tokenizer())
    return path


def cold_start(directory, flaws, **settings):
    chat = Chat.from_dir(directory)
    config = tiny_model.tiny_config(chat.tokenizer)
    processor = ImageProcessor.from_dir(directory)
    return ColdStart(chat, config, processor, settings=Settings(**settings), flaws=flaws, seed=0, context_weight=0.1)


def accuracy(source, count=60):
    rng = np.random.default_rng(0)
    return np.mean([rewards.score(source.episode(rng))["accuracy"] for _ in range(count)])


def test_a_flawless_expert_is_nearly_always_right_and_a_flawed_one_often_wrong(directory):
    assert accuracy(cold_start(directory, NONE)) > 0.85
    assert 0.1 < accuracy(cold_start(directory, Flaws())) < 0.65


@pytest.mark.parametrize("kind", closed.KINDS)
@pytest.mark.parametrize("outlines", [1, 2])
def test_a_flawless_expert_answers_every_kind_of_question_by_looking_it_up(directory, kind, outlines):
    source, rng = cold_start(directory, NONE, mix=((kind, 1.0),), outlines=outlines), np.random.default_rng(0)
    episodes = [source.episode(rng) for _ in range(20)]
    assert np.mean([rewards.score(episode)["accuracy"] for episode in episodes]) > 0.85
    assert all(TEXT_SEARCH in [turn.call.name for turn in episode.turns if turn.call] for episode in episodes)


def test_an_expert_that_guesses_calls_no_tool_and_is_right_by_chance(directory):
    flaws = Flaws(**{field.name: 0.0 for field in dataclasses.fields(Flaws)} | {"guess": 0.5})
    mix = (("position", 1.0), ("border", 1.0))
    source, rng = cold_start(directory, flaws, mix=mix, size=32), np.random.default_rng(0)
    episodes = [source.episode(rng) for _ in range(160)]
    guesses = [episode for episode in episodes if len(episode.turns) == 1]
    assert 0.35 < len(guesses) / len(episodes) < 0.65
    assert 0.3 < np.mean([rewards.score(episode)["accuracy"] for episode in guesses]) < 0.7
    told = {episode.answer for episode in guesses}
    assert told == {"coastal", "landlocked", "yes", "no"}


def test_an_open_question_is_never_guessed(directory):
    flaws = Flaws(**{field.name: 0.0 for field in dataclasses.fields(Flaws)} | {"guess": 1.0})
    source = cold_start(directory, flaws, size=32)
    assert all(len(source.episode(np.random.default_rng(seed)).turns) > 1 for seed in range(8))


def test_batches_weigh_what_the_policy_writes(directory):
    source, rng = cold_start(directory, Flaws()), np.random.default_rng(1)
    for batch in (source.full(rng, 2, 480, 320), source.where(rng, 2, 256), source.text_part(rng, 2, 176)):
        weight = batch.weight_BxT
        assert set(np.unique(weight)) <= {np.float32(0), np.float32(0.1), np.float32(1)} and (weight == 1).any(1).all()
        assert not weight[batch.inputs.segment_BxT == 0].any() and not weight[:, 0].any()


def test_what_is_weighed_in_a_copying_sequence_can_be_known_from_before(directory):
    """Before every weighed token is a pair (or, inside one word, a longer history) that the sequence had earlier."""
    batch = cold_start(directory, Flaws()).copy(np.random.default_rng(2), 8, 64)
    for token_T, weight_T in zip(batch.inputs.token_BxT, batch.weight_BxT, strict=True):
        places = np.flatnonzero(weight_T)
        assert len(places) and places[0] > 0
        for t in places:
            earlier = itertools.pairwise(token_T[:t])
            assert (token_T[t - 1], token_T[t]) in set(earlier)
