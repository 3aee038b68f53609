"""Questions of Atlas that can be guessed: true answers, equally often, from the split's countries."""

import collections
import dataclasses

import numpy as np
import pytest

from tapo_jax.atlas import closed, dataset
from tapo_jax.atlas.play import Settings, make_prompt, make_tools, parse_id
from tapo_jax.atlas.questions import corpus
from tapo_jax.atlas.world import LANDLOCKED, _records, fictional_world, real_world
from tapo_jax.check import check
from tapo_jax.config import UserError, beside
from tapo_jax.data import atlas
from tapo_jax.data.sources import atlas_settings
from tapo_jax.types import TEXT_SEARCH

CONFIG = __file__.replace("tests/test_atlas_closed.py", "configs/tapo_grpo.py")


@pytest.fixture(scope="module")
def worlds():
    return {split: real_world(split) for split in dataset.SPLITS}


def only(kind: str, **settings) -> Settings:
    return Settings(mix=((kind, 1.0),), **settings)


def drawn(world, kind, count=40, **settings):
    rng = np.random.default_rng(0)
    return [make_prompt(world, only(kind, **settings), rng) for _ in range(count)]


def test_facts_with_few_values_are_true(worlds):
    facts = {name: country.closed for name, country in worlds["train"].countries.items()}
    assert facts["Kenya"] == {"continent": "Africa", "position": "coastal"}
    assert facts["Nepal"] == {"continent": "Asia", "position": "landlocked"}
    assert facts["Bolivia"]["position"] == facts["Austria"]["position"] == "landlocked"
    assert facts["Peru"] == {"continent": "Americas", "position": "coastal"}
    assert {record["ISO"]["alpha3"] for record in _records()} >= LANDLOCKED and len(LANDLOCKED) == 44


@pytest.mark.parametrize("kind", closed.KINDS)
@pytest.mark.parametrize("split", dataset.SPLITS)
def test_a_question_is_about_its_scene_and_its_answer_is_true(worlds, split, kind):
    world = worlds[split]
    for prompt, question, scene in drawn(world, kind, hops=(1, 2, 3), outlines=2):
        names = [placed.name for placed in scene]
        assert set(question.chain) <= set(world.asked) and question.chain[0] == names[0]
        assert set(question.answers) < set(question.options) and parse_id(prompt.id) == (kind, list(question.chain))
        first, last = world.countries[question.chain[0]], world.countries[question.chain[-1]]
        colour = {placed.name: placed.colour for placed in scene}
        if kind in closed.SINGLE:
            assert question.answers == (last.closed[kind],) and prompt.hops == len(question.chain)
            for here, relation, there in zip(question.chain, question.relations, question.chain[1:], strict=False):
                assert world.follow(here, relation) == there
            assert f"drawn in {colour[names[0]]}" in question.text
            continue
        assert list(question.chain) == names[:2] and prompt.hops == (1 if kind == "border" else 2)
        assert all(f" {colour[name]}" in question.text for name in names[:2])
        if kind == "border":
            assert question.answers == ("yes" if last.name in first.neighbours else "no",)
        else:
            value = lambda country: country.area if kind == "larger" else country.population  # noqa: E731
            assert question.answers == (colour[max((first, last), key=value).name],)


@pytest.mark.parametrize(("kind", "few", "many"), [("continent", 3, 5), ("position", 2, 2), ("border", 2, 2)])
def test_every_answer_is_asked_for_about_equally_often(worlds, kind, few, many):
    for split, expected in (("held_out", few), ("train", many)):
        counts = collections.Counter(q.answers[0] for _, q, _ in drawn(worlds[split], kind, 200, hops=(1,), size=32))
        assert len(counts) == expected and max(counts.values()) < 1.6 * 200 / expected


@pytest.mark.parametrize("kind", closed.KINDS)
def test_the_passages_that_a_question_needs_are_found_and_hold_the_answer(worlds, kind):
    world = worlds["held_out"]
    search = next(tool for tool in make_tools(world, only(kind)) if tool.name == TEXT_SEARCH)
    for _, question, _ in drawn(world, kind, 12, hops=(1, 2), size=32):
        words = closed.PASSAGES[kind][2] if kind in closed.PAIRS else kind
        asked = question.chain if kind in closed.PAIRS else question.chain[-1:]
        found = {name: search.search(f"{name}, {words}")[0][0] for name in asked}
        assert {passage.split("\n")[0] for passage in found.values()} <= closed.needed(kind, question.chain)
        text = found[question.chain[-1]]
        if kind in closed.SINGLE:
            assert f"The {kind} of {question.chain[-1]}: {question.answers[0]}." in text
        elif kind == "border":
            listed = found[question.chain[0]].split(": ")[1].rstrip(".").split(", ")
            assert (question.chain[1] in listed) == (question.answers == ("yes",))
        else:
            assert f"The {closed.PASSAGES[kind][1]} of {question.chain[-1]}: " in text


def test_without_such_questions_the_tools_search_the_same_passages_as_before(worlds):
    text = lambda settings: make_tools(worlds["train"], settings)[2]._passages  # noqa: E731
    assert text(Settings()) == corpus(worlds["train"])
    assert text(only("border"))[: len(corpus(worlds["train"]))] == corpus(worlds["train"])
    assert len(text(only("border"))) > len(corpus(worlds["train"]))


def test_the_shares_of_a_mixture_are_kept(worlds):
    rng, settings = np.random.default_rng(5), Settings(mix=(("open", 1.0), ("position", 3.0)), size=32, outlines=1)
    kinds = [make_prompt(worlds["train"], settings, rng)[1].attribute for _ in range(300)]
    assert 0.67 < np.mean([kind == "position" for kind in kinds]) < 0.83
    assert not {"continent", "border", "larger", "populous"} & set(kinds)


def test_the_default_config_asks_open_questions_alone_and_the_band_some_of_them():
    default, band = (atlas_settings(beside(CONFIG, "tapo_grpo.py")(arg)) for arg in ("", "band"))
    assert default == Settings()
    shares = dict(band.mix)
    assert 0 < shares["open"] < 0.5 * sum(shares.values())


def test_questions_of_a_mixture_come_back_from_their_files(tmp_path, worlds):
    settings = Settings(mix=(("open", 1.0), ("larger", 1.0), ("continent", 1.0)), outlines=1)
    prompts = atlas.read(tmp_path, "held_out", settings=settings, seed=2, sizes=(2, 24))
    kinds = collections.Counter(prompt.meta["attribute"] for prompt in prompts)
    assert kinds["larger"] and kinds["continent"] and len(kinds) > 2
    for prompt in prompts:
        assert set(prompt.meta["chain"]) <= set(worlds["held_out"].asked)


def test_invented_worlds_have_the_facts_without_a_change_of_the_others():
    world = fictional_world(4, 40)
    assert all(set(country.closed) == set(closed.SINGLE) for country in world.countries.values())
    assert list(world.countries)[:2] == ["Tigu", "Gigvothtrogirk"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"data.mix.open": 0.0}, "data.mix.open and all its other shares are 0"),
        ({"data.outlines": 6, "data.outline": (0.4, 0.5)}, "6 outlines .* do not fit"),
        ({"data.outlines": 1, "data.outline": (0.5, 0.6), "data.mix.border": 1.0}, "2 outlines .* do not fit"),
        ({"data.mix.border": -1.0}, "data.mix.border is -1.0"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence_before_training(fields, says):
    config = beside(CONFIG, "tapo_grpo.py")("")
    check(config)
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=says):
        check(config)


def test_one_outline_is_enough_for_the_data_set_of_any_kind(worlds):
    for kind in closed.KINDS:
        _, question, scene = drawn(worlds["train"], kind, 1, outlines=1, hops=(1,))[0]
        assert len(scene) == (2 if kind in closed.PAIRS else 1)
        assert {field.name for field in dataclasses.fields(question)} >= {"options"}
