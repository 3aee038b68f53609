"""Which calls a round makes: enough rows for every need, only shapes that warm-up compiles, the same in every
process."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_jax.models.inputs import Row
from tapo_jax.rollout.schedule import Draw, Extension, Needs, Piece, Shapes, cover, group, most_in_a_shard, place, plan

SHAPES = Shapes(
    extend_rows=(2, 8), decode_rows=(2, 4, 8), lengths=(16, 64), patches=(32, 64), windows=(48, 96), chunk=8, merge=2,
    tokens_per_call=256,
)  # fmt: skip
ALONE = np.asarray  # agreement of one process


def extension(slot: int, tokens: int, patches: int = 0, before: int = 0) -> Extension:
    pixels = (np.zeros((patches, 3), np.float32),) if patches else ()
    return Extension(
        slot, before, Row(np.zeros(tokens, np.int32), np.zeros((tokens, 3), np.int32), pixels), fresh=before == 0
    )


def draw(slot: int, length: int) -> Draw:
    return Draw(slot, length, position=length, allowance=5, drawn=0, prompt=0, sample=0, turn=0)


def test_the_calls_of_a_small_round():
    needs = [extension(0, 10), extension(1, 16), extension(3, 17, 20), extension(4, 12, 40, before=50)]
    found = plan(SHAPES, Needs(needs, [(0, 2)], [draw(0, 40), draw(5, 20), draw(6, 20)]), more=True, agree=ALONE)
    assert found.pieces == (
        Piece(2, 16, 0, 48),  # 16 tokens behind nothing fit into 48
        Piece(2, 16, 64, 96),  # 40 patches; 50 + 16 places are more than 48
        Piece(2, 64, 32, 96),  # 64 tokens are more than 48
    )
    assert (found.copy_rows, found.decode_rows, found.decode_window, found.more) == (
        2,
        4,
        48,
        True,
    )  # 40 + 8 tokens fit into 48


def test_an_idle_process_makes_the_calls_of_the_busy_one():
    busy = Needs([extension(0, 10), extension(9, 60)], [(0, 1)], [draw(0, 80)])
    vectors = []
    plan(SHAPES, busy, more=True, agree=lambda vector: vectors.append(vector) or vector)
    plan(SHAPES, Needs(), more=False, agree=lambda vector: vectors.append(vector) or vector)
    agree = lambda _: np.maximum(*vectors)  # noqa: E731
    assert plan(SHAPES, Needs(), more=False, agree=agree) == plan(SHAPES, busy, more=True, agree=agree)
    assert not plan(SHAPES, Needs(), more=False, agree=ALONE).more


def test_rows_of_a_call_are_bounded_by_its_tokens():
    assert SHAPES.rows_of(16, 0) == (2, 8) and SHAPES.rows_of(64, 0) == (2,)  # 8 · 64 > 256
    assert dataclasses.replace(SHAPES, tokens_per_call=100).rows_of(64, 0) == (1,)  # 2 · 64 > 100
    assert dataclasses.replace(SHAPES, tokens_per_call=100).rows_of(16, 256) == (1,)  # 256 patches count as 64 tokens
    assert SHAPES.patches_of(16) == (0, 32, 64) and SHAPES.patches_of(4) == (0, 16)  # four tokens stand for 16 patches


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_every_need_is_met_by_a_call_that_warm_up_compiles(data):
    slots = data.draw(st.lists(st.integers(0, 15), unique=True, max_size=16))  # two shards of 8
    needs = []
    for slot in slots:
        tokens = data.draw(st.integers(1, 64))
        patches = data.draw(st.integers(0, 16)) * 4 if tokens >= 16 else 0
        needs.append(extension(slot, tokens, patches, before=data.draw(st.integers(0, 96 - tokens))))
    draws = [draw(slot, data.draw(st.integers(1, 95))) for slot in slots]
    found = plan(SHAPES, Needs(needs, [], draws), more=True, agree=ALONE)
    assert set(found.pieces) <= set(SHAPES.extend_calls())
    if draws:
        assert (found.decode_rows, found.decode_window) in set(SHAPES.decode_calls())
        assert found.decode_rows >= most_in_a_shard(slots, 8)
        assert min(max(d.length for d in draws) + 8, 96) <= found.decode_window
    waiting = group(SHAPES, needs)
    for piece in found.pieces:
        queue = waiting[piece.length, piece.patches]
        taken = {int(i) for i in place([e.slot for e in queue], 2, 8, piece.rows).flat if i >= 0}
        for index in taken:
            e = queue[index]
            assert len(e.row.token_T) <= piece.length and e.row.patches <= piece.patches
            assert max(e.before + len(e.row.token_T), piece.length) <= piece.window
        waiting[piece.length, piece.patches] = [e for index, e in enumerate(queue) if index not in taken]
    assert not any(waiting.values())


def test_place_fills_each_shard_and_keeps_the_order_of_a_full_one():
    # Slots 1, 2 are in shard 0 and 5, 4, 7 in shard 1 (four slots each).
    np.testing.assert_array_equal(place([1, 5, 2, 4, 7], 2, 4, 2), [[0, 2], [1, 3]])  # slot 7 waits for the next call
    np.testing.assert_array_equal(place([1, 5, 2, 4, 7], 2, 4, 4), [[-1, 0, 2, -1], [3, 1, -1, 4]])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, []), (1, [4]), (3, [4]), (5, [4, 4]), (9, [16]), (16, [16]), (21, [16, 4, 4]), (40, [64]), (130, [64, 64, 4])],
)  # fmt: skip
def test_cover(rows, expected):
    """One larger call where at most half of it is wasted, else the largest that is filled: 4 + 1, not 5 of 16."""
    assert cover(rows, (4, 16, 64)) == expected


def test_made_shapes_fit_the_numbers_that_they_are_made_from():
    shapes = Shapes.make(slots=64, capacity=768, chunk=16, merge=2, image_patches=256, most_patches=768 * 4)
    assert shapes.slots == 64 and shapes.capacity == 768 and shapes.lengths[-1] == 768
    assert 256 in shapes.patches and shapes.patches[-1] == 768 * 4
    assert shapes.windows == (768,) and Shapes.make(
        slots=4, capacity=4096, chunk=16, merge=2, image_patches=256, most_patches=1024
    ).windows == (2048, 4096)
    # Where decoding reads the slots in place, every call is on all slots and all places.
    sizes = {"slots": 12, "capacity": 4096, "chunk": 16, "merge": 2, "image_patches": 256, "most_patches": 1024}
    in_place = Shapes.make(**sizes, in_place=True)
    assert Shapes.make(**sizes).decode_rows == (6, 8, 12)
    assert (in_place.decode_rows, in_place.windows, in_place.extend_rows) == ((12,), (4096,), (8, 12))
    one = Shapes.make(slots=1, capacity=20, chunk=4, merge=2, image_patches=1000, most_patches=80)
    assert (one.extend_rows, one.decode_rows, one.lengths, one.patches, one.windows) == (
        (1,),
        (1,),
        (20,),
        (80,),
        (20,),
    )
