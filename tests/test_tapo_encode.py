"""Encoding and similarity of calls of any tool family, against plain loops over the raw parameters."""

import zlib

import jax
import numpy as np
import pytest
import random_tapo
import reference_tapo

from tapo_jax import tapo
from tapo_jax.tapo import encode
from tapo_jax.tapo import similarity as tapo_similarity
from tapo_jax.types import Identity, Number, Region, Text

pairwise = jax.jit(tapo.pairwise_similarity, static_argnames="text")


def similarity(a, b, measure="dice"):
    steps = tapo.encode_steps([[[a, b]]], steps=2, features=4096, regions=1, texts=2, numbers=1)
    sim = np.asarray(pairwise(steps, text=measure))[0]
    assert sim[0, 0] == sim[1, 1] == 1 and sim[0, 1] == sim[1, 0]
    return float(sim[0, 1])


@pytest.mark.parametrize("measure", tapo_similarity.TEXT_MEASURES)
def test_equal_to_plain_loops(measure):
    P, G, K, features = 40, 4, 4, 64  # few bins: collisions, and counts well above 1
    groups = random_tapo.groups(11, P, G, K)
    steps = tapo.encode_steps(groups, steps=K, features=features)
    sim = np.asarray(pairwise(steps, text=measure))
    assert sim.dtype == np.float32
    pairs = 0
    for p in range(P):
        slots = [rollout[k] if k < len(rollout) else None for rollout in groups[p] for k in range(K)]
        for i, a in enumerate(slots):
            for j, b in enumerate(slots):
                expected = 0.0
                if a and b:
                    bin_of = lambda token: zlib.crc32(token.encode()) % features  # noqa: E731
                    expected = reference_tapo.call_similarity(a, b, measure, bin_of)
                    pairs += i != j and 0 < expected < 1
                assert abs(sim[p, i, j] - expected) < 2e-6, (a, b)
    assert pairs > 100 or measure == "exact"


def test_regions_by_hand():
    def region(*box, root=1):
        return ("zoom", (Region(root, box),))

    # [0, .4]² and [.2, .6]×[0, .4]: intersection .08, union .24.
    assert abs(similarity(region(0, 0, 0.4, 0.4), region(0.2, 0, 0.6, 0.4)) - 1 / 3) < 1e-6
    assert similarity(region(0, 0, 0.4, 0.4), region(0.5, 0, 0.6, 0.4)) == 0
    assert similarity(region(0, 0, 0.4, 0.4), region(0, 0, 0.4, 0.4, root=2)) == 0
    assert similarity(region(0.3, 0.3, 0.3, 0.3), region(0.3, 0.3, 0.3, 0.3)) == 1  # no area, but the same
    assert similarity(region(0.3, 0.3, 0.3, 0.3), region(0.4, 0.4, 0.4, 0.4)) == 0


def test_equal_calls_are_exactly_one_and_nothing_is_above():
    """theta = 1 is the exact-match ablation: it must not hang on a rounding of IoU or of a mean over three
    parameters."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(300):
        x1, y1 = rng.random(2) * 0.7
        box = (x1, y1, x1 + rng.random() * 0.3, y1 + rng.random() * 0.3)
        words = " ".join(rng.choice(random_tapo.WORDS, 6))
        call = ("zoom", (Region(5, box), Text(words), Number(rng.random() * 7, -3, 11)))
        groups.append([[call], [call]])
    for measure in tapo_similarity.TEXT_MEASURES:
        sim = pairwise(tapo.encode_steps(groups, steps=1), text=measure)
        assert (np.asarray(sim) == 1).all(), measure


def test_text_by_hand():
    def query(text):
        return ("search", (Text(text),))

    # "ab": w-ab, " ab", "ab "; "ac": w-ac, " ac", "ac ". "ab ab" has each of the first three twice.
    assert similarity(query("ab"), query("ac")) == 0
    assert abs(similarity(query("ab"), query("ab ab")) - 2 * 3 / 9) < 1e-6
    assert abs(similarity(query("ab"), query("ab ab"), "jaccard") - 3 / 6) < 1e-6
    assert abs(similarity(query("ab"), query("ab ab"), "cosine") - 1) < 1e-6  # the same direction
    assert similarity(query("ab"), query("ab ab"), "exact") == 0
    # case, spaces and compatibility forms do not count
    assert similarity(query("Eiffel  Tower"), query("eiffel\ttower"), "exact") == 1
    assert similarity(query("Ｅｉｆｆｅｌ"), query("eiffel"), "exact") == 1
    assert similarity(query(""), query("")) == 1 and similarity(query(""), query("eiffel")) == 0
    assert similarity(query("???"), query("!!!")) == 0 and similarity(query("???"), query("???")) == 1
    # punctuation is no word
    assert similarity(query("eiffel tower?"), query("eiffel tower")) == 1


def test_long_texts_saturate_but_still_compare():
    groups = [[[("code", (Text(line * 5000),)) for line in ("x = 1\n", "y = 2\n")]]]
    steps = tapo.encode_steps(groups, steps=2, features=32)
    assert steps.text_PxSxXxF.max() == encode.MAX_COUNT
    sim = np.asarray(tapo.pairwise_similarity(steps))[0]
    expected = np.minimum(*steps.text_PxSxXxF[0, :, 0].astype(int)).sum() * 2 / steps.text_PxSxXxF.astype(int).sum()
    assert abs(sim[0, 1] - expected) < 1e-6 and sim[0, 0] == 1


@pytest.mark.parametrize("features", [1, 31, 32, 33, 256])
def test_shared_counts_are_exact_for_any_width_and_count(features):
    count = np.random.default_rng(features).integers(0, 40, (3, 7, features)).astype(np.uint8)
    count[0, :, 0] = [255, 254, 129, 128, 127, 126, 0]
    expected = np.minimum(count[:, :, None].astype(int), count[:, None].astype(int)).sum(-1)
    np.testing.assert_array_equal(jax.jit(tapo_similarity.shared_counts)(count), expected)


def test_other_tool_families():
    def calculator(op, value):
        return ("calculator", (Identity(op), Number(value, 0.0, 10.0)))

    assert abs(similarity(calculator("add", 2), calculator("add", 4.5)) - 0.75) < 1e-6
    assert similarity(calculator("add", 2), calculator("mul", 2)) == 0
    assert similarity(calculator("add", -40), calculator("add", 40)) == 0
    assert similarity(calculator("add", float("inf")), calculator("add", float("inf"))) == 1
    assert similarity(calculator("add", float("nan")), calculator("add", 3)) == 0

    def visit(url, goal):
        return ("visit", (Identity(url), Text(goal)))

    same = similarity(("search", (Text("the height of it"),)), ("search", (Text("height of it"),)))
    assert abs(similarity(visit("a.org", "the height of it"), visit("a.org", "height of it")) - same) < 1e-6
    assert similarity(visit("a.org", "height"), visit("b.org", "height")) == 0
    # a url as text beside a goal as text: the mean of both
    two = [("visit", (Text(url), Text("height"))) for url in ("a.org/x", "b.net/y")]
    urls = similarity(*[("visit", (Text(url),)) for url in ("a.org/x", "b.net/y")])
    assert abs(similarity(*two) - (urls + 1) / 2) < 1e-6

    def code(source):
        return ("code", (Text(source),))

    near, far = code("print(sum(range(11)))"), code("import os")
    assert similarity(code("print(sum(range(10)))"), near) > 0.7 > similarity(code("print(sum(range(10)))"), far)
    assert similarity(("code", (Text("x"),)), ("search", (Text("x"),))) == 0
    assert similarity(("clock", ()), ("clock", ())) == 1


def test_a_parameter_that_only_one_call_has_counts_as_different():
    region = Region(3, (0.0, 0.0, 0.5, 0.5))
    assert similarity(("zoom", (region, Text("tower"))), ("zoom", (region,))) == 0.5


def test_shapes_do_not_depend_on_the_batch_when_slots_are_given():
    properties = {"url": {"type": "string", "x-kind": "identity"}, "goal": {"type": "string", "x-kind": "text"}}
    parameters = {"type": "object", "properties": properties}
    schema = {"type": "function", "function": {"name": "visit", "parameters": parameters}}
    image = {"function": {"parameters": {"properties": {"img_idx": {"x-kind": "image"}, "n": {"x-kind": "number"}}}}}
    slots = tapo.parameter_slots([schema, image])
    assert slots == {"regions": 1, "texts": 1, "numbers": 1}
    a = tapo.encode_steps([[[("clock", ())]]], steps=3, **slots)
    b = tapo.encode_steps([[[("visit", (Identity("a"), Text("b")))]]], steps=3, **slots)
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
    assert a.text_PxSxXxF.shape == (1, 3, 1, 256)


def test_empty_batches_and_slots():
    steps = tapo.encode_steps([[[], [None]]], steps=2)
    assert not steps.valid_PxS.any() and (np.asarray(tapo.pairwise_similarity(steps)) == 0).all()
    assert steps.trajectory_PxS.tolist() == [[0, 0, 1, 1]]
    filled = tapo.encode_steps([[[None, ("clock", ())], []]], steps=2)
    assert filled.valid_PxS.tolist() == [[False, True, False, False]]


def test_errors_name_the_place():
    call = ("search", (Text("a"), Text("b")))
    with pytest.raises(ValueError, match="group 1, rollout 0 has 3 steps"):
        tapo.encode_steps([[[]], [[call] * 3]], steps=2)
    with pytest.raises(ValueError, match="search has more than 1 Text"):
        tapo.encode_steps([[[call]]], steps=2, texts=1)
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        tapo.encode_steps([[[]], [[], []]], steps=2)
    with pytest.raises(ValueError, match="low < high"):
        tapo.encode_steps([[[("n", (Number(1.0, 2.0, 2.0),))]]], steps=2)
    steps = tapo.encode_steps([[[call]]], steps=1, embed=lambda text: np.ones(4), features=4)
    with pytest.raises(ValueError, match="cosine"):
        tapo.pairwise_similarity(steps)
    with pytest.raises(ValueError, match="levenshtein"):
        tapo.pairwise_similarity(steps, "levenshtein")
