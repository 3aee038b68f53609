"""The embedded world: real facts, disjoint splits, the same bytes from the same seed."""

import hashlib
import pathlib

import numpy as np
import pytest

from tapo_jax.atlas import dataset
from tapo_jax.atlas.play import Settings, make_prompt
from tapo_jax.atlas.questions import ask, corpus
from tapo_jax.atlas.scene import BACKGROUND, COLOURS, draw_scene
from tapo_jax.atlas.world import ATTRIBUTES, fictional_world, real_world
from tapo_jax.data.atlas import AtlasPrompts


@pytest.fixture(scope="module")
def worlds():
    return {split: real_world(split) for split in dataset.SPLITS}


def test_the_splits_share_no_country(worlds):
    train, held_out = set(worlds["train"].asked), set(worlds["held_out"].asked)
    assert not train & held_out and len(train) > 100 and len(held_out) > 40
    assert train | held_out == set(worlds["train"].countries) == set(worlds["held_out"].countries)


def test_real_facts(worlds):
    kenya = worlds["train"].countries["Kenya"]
    assert kenya.facts == {
        "capital": ("Nairobi",),
        "currency": ("KES",),
        "calling code": ("254",),
        "demonym": ("Kenyan",),
    }
    assert kenya.neighbours[0] == "Ethiopia" and kenya.neighbours[-1] == "Uganda"
    assert all(name.isascii() for name in worlds["train"].countries)


def test_outlines_fill_a_unit_square(worlds):
    for country in worlds["train"].countries.values():
        points = np.concatenate(country.outline)
        assert (
            points.min() > -1e-5
            and points.max() < 1 + 1e-5
            and np.ptp(points, axis=0).max() == pytest.approx(1, abs=1e-4)
        )


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    def digests(folder, seed):
        dataset.prepare(folder, settings=Settings(), seed=seed, sizes=(6, 4))
        files = sorted(pathlib.Path(folder).rglob("*.array_record*"))
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    first, again, other = digests(tmp_path / "a", 1), digests(tmp_path / "b", 1), digests(tmp_path / "c", 2)
    assert len(first) == 2 and first == again and first[0] != other[0] and first[1] != other[1]


def test_prompts_round_trip(tmp_path, worlds):
    builder = dataset.prepare(tmp_path, settings=Settings(hops=(2,)), seed=5, sizes=(3, 8))
    prompts = AtlasPrompts(builder, "held_out")
    assert len(prompts) == 8 and len({prompt.id for prompt in prompts}) == 8
    for prompt in prompts:
        assert prompt.hops == 2 and prompt.images[0].shape == (256, 256, 3) and prompt.images[0].dtype == np.uint8
        first, last = prompt.meta["chain"]
        assert {first, last} <= set(worlds["held_out"].asked)
        assert prompt.answers == worlds["held_out"].countries[last].facts[prompt.meta["attribute"]]


def test_a_scene_shows_each_outline_in_its_box_and_colour(worlds):
    rng = np.random.default_rng(0)
    countries = [worlds["train"].countries[name] for name in ("Peru", "Chad", "France", "Japan")]
    pixels, placed = draw_scene(countries, size=256, outline=(0.18, 0.25), rng=rng)
    outside = np.ones(pixels.shape[:2], bool)
    for item in placed:
        x1, y1, x2, y2 = (round(value * 256) for value in item.box)
        inside = pixels[max(y1 - 1, 0) : y2 + 2, max(x1 - 1, 0) : x2 + 2]
        assert (inside == np.array(COLOURS[item.colour])).all(-1).mean() > 0.1
        outside[max(y1 - 1, 0) : y2 + 2, max(x1 - 1, 0) : x2 + 2] = False
    assert (pixels[outside] == np.array(BACKGROUND)).all()
    assert len({item.colour for item in placed}) == 4


def test_a_scene_that_is_too_full_is_an_error(worlds):
    countries = list(worlds["train"].countries.values())[:6]
    with pytest.raises(ValueError, match="do not fit"):
        draw_scene(countries, size=64, outline=(0.6, 0.7), rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("count", "outline"), [(6, (0.3, 0.32)), (4, (0.46, 0.5)), (2, (0.47, 0.47)), (5, (0.25, 0.9))]
)
def test_a_scene_in_which_random_places_hardly_ever_fit_is_drawn_all_the_same(worlds, count, outline):
    countries = list(worlds["train"].countries.values())[:count]
    draw = lambda: draw_scene(countries, size=128, outline=outline, rng=np.random.default_rng(3))  # noqa: E731
    pixels, placed = draw()
    again, _ = draw()
    assert np.array_equal(pixels, again)
    boxes = np.array([item.box for item in placed])
    assert len(boxes) == count and boxes.min() >= 0 and boxes.max() <= 1
    for a, (x1, y1, x2, y2) in enumerate(boxes):
        for u1, v1, u2, v2 in boxes[a + 1 :]:
            assert x2 < u1 or u2 < x1 or y2 < v1 or v2 < y1


def test_every_answer_stands_in_the_corpus(worlds):
    """Each question's chain can be walked through the passages, so it can be answered by looking up."""
    text = set("\n".join(corpus(worlds["train"])).splitlines())
    rng = np.random.default_rng(0)
    for _ in range(50):
        _, question, _ = make_prompt(worlds["held_out"], Settings(hops=(1, 2, 3)), rng)
        for here, relation, there in zip(question.chain, question.relations, question.chain[1:], strict=False):
            line = next(line for line in text if line.startswith(f"Neighbours of {here}. "))
            assert f"The {relation} of {here}: {there}." in line
        assert f"The {question.attribute} of {question.chain[-1]}: {question.answers[0]}." in text


def test_questions_of_the_held_out_split_never_leave_it(worlds):
    rng = np.random.default_rng(1)
    world = worlds["held_out"]
    questions = [ask(world, name, "red", 3, rng) for name in world.asked for _ in range(3)]
    found = [question for question in questions if question is not None]
    assert len(found) > 20 and all(set(question.chain) <= set(world.asked) for question in found)


def test_invented_worlds_differ_and_repeat():
    one, again, other = fictional_world(1, 30), fictional_world(1, 30), fictional_world(2, 30)
    assert list(one.countries) == list(again.countries) and corpus(one) == corpus(again)
    assert not set(one.countries) & set(other.countries)
    assert all(set(country.facts) == set(ATTRIBUTES) for country in one.countries.values())
