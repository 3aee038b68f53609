"""The slots themselves, and `generate`: equal to a model without a cache, whatever the shapes of the calls."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest
import rollout_world as world
from flax import nnx

from tapo_jax import sharding
from tapo_jax.models import qwen3_vl
from tapo_jax.models.inputs import make_row
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rollout import slots
from tapo_jax.rollout.generate import continue_rows, generate, prompt_rows
from tapo_jax.rollout.sampler import Sampler
from tapo_jax.rollout.schedule import Draw, Extension, Needs, Round, Sampling, Shapes
from tapo_jax.types import root_image

CONFIG, IMAGE = world.config(), world.config().image_token
PROMPTS = [[5, 6, 7], [9], [1, 2, CONFIG.vision_start, IMAGE, CONFIG.vision_end, 3], [4, IMAGE, IMAGE, 8]]
IMAGES = [[], [], [world.picture(1)], [world.picture(2, 16, 24), world.picture(3, 8, 8)]]

FIELDS = dataclasses.fields(Sampling)


def gen(prompts=PROMPTS, images=IMAGES, processor=world.PROCESSOR, model=None, **options):
    numbers = {"temperature": 0.0} | {f.name: options.pop(f.name) for f in FIELDS if f.name in options}
    sampling = Sampling(**numbers)
    rows = prompt_rows(prompts, images, CONFIG, processor)
    return continue_rows(model or world.model(), rows, sampling, **{"max_new_tokens": 12, "slots": 4, **options})


@pytest.fixture(scope="module")
def greedy():
    return gen()


def test_greedy_equals_the_public_forward_pass(greedy):
    """Each new token is the best successor of all before it, by `forward`: no cache, no padding, no slots."""
    forbidden = [IMAGE, CONFIG.video_token, CONFIG.vision_start, CONFIG.vision_end]
    for prompt, images, written in zip(PROMPTS, IMAGES, greedy, strict=True):
        processed = [world.PROCESSOR(image) for image in images]
        counts = iter([world.PROCESSOR.tokens(grid) for _, grid in processed])
        expanded = [copy for token in prompt for copy in [token] * (next(counts) if token == IMAGE else 1)]
        vision = {}
        if images:
            vision = {
                "pixels_NxF": np.concatenate([pixels for pixels, _ in processed]),
                "grid_thw_Ix3": np.array([grid for _, grid in processed]),
            }
        logits_TxV = np.array(qwen3_vl.forward(world.model(), np.array([expanded + written]), **vision))[0]
        logits_TxV[:, forbidden] = -np.inf
        assert logits_TxV.argmax(axis=-1)[len(expanded) - 1 : -1].tolist() == written
        assert len(set(written)) > 2  # it does not repeat one token


def test_neither_neighbours_nor_slots_nor_budgets_change_the_tokens(greedy):
    assert gen(slots=3) == greedy  # the last prompt waits for the second batch
    assert gen(PROMPTS[::-1], IMAGES[::-1], max_new_tokens=5) == [written[:5] for written in greedy[::-1]]
    long = gen(max_new_tokens=70)  # more than the 64 tokens of one decoding call
    assert [len(written) for written in long] == [70] * 4 and [written[:12] for written in long] == greedy


def test_placeholders_may_be_expanded_already(greedy):
    tokens = world.PROCESSOR.tokens(world.PROCESSOR.grid(24, 24))
    assert tokens == 9
    prompts = [
        *PROMPTS[:2],
        [1, 2, CONFIG.vision_start, *[IMAGE] * 9, CONFIG.vision_end, 3],
        [4, *[IMAGE] * 6, IMAGE, 8],
    ]
    assert gen(prompts) == greedy
    # Without a processor the counts tell that the images kept their sizes (the published bounds would enlarge them).
    assert gen(prompts, processor=None) == greedy


def test_a_stop_token_ends_a_row_and_is_its_last(greedy):
    stop = greedy[1][4]
    for written, whole in zip(gen(stop_ids=[stop]), greedy, strict=True):
        assert written == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_sampling_depends_on_the_seed_and_the_row():
    prompts, images = PROMPTS[2:3] * 4, IMAGES[2:3] * 4
    first = gen(prompts, images, temperature=1.0)
    assert first == gen(prompts, images, temperature=1.0)
    assert first != gen(prompts, images, temperature=1.0, seed=1)
    assert len({tuple(written) for written in first}) == 4
    only_the_best = gen(prompts, images, temperature=1.0, top_p=1e-6)
    assert only_the_best == gen(prompts, images)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_wants_to_write_vision_tokens_cannot(temperature):
    eager = Qwen3VL(CONFIG, rngs=nnx.Rngs(0))
    nnx.update(eager, nnx.state(world.model()))
    rows = np.array(eager.lm_head[...])
    vision = [IMAGE, CONFIG.video_token, CONFIG.vision_start, CONFIG.vision_end]
    usual = qwen3_vl.forward(eager, np.array([[5, 6, 7]]))
    # Each vision token's logit is 30 times that of the best other token, or of the worst with its sign changed.
    rows[vision] = 30 * rows[[int(usual[0, -1].argmax()), int(usual[0, -1].argmin())] * 2] * np.array([[1], [-1]] * 2)
    eager.lm_head[...] = rows
    assert int(qwen3_vl.forward(eager, np.array([[5, 6, 7]]))[0, -1].argmax()) in vision
    written = np.concatenate(gen(model=eager, temperature=temperature))
    assert len(written) == 48 and not np.isin(written, vision).any()


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        gen([[1], []], None)
    with pytest.raises(ValueError, match=r"3 image placeholders for images of \[9\] tokens"):
        gen([[1, IMAGE, IMAGE, IMAGE]], [[world.picture(1)]])
    with pytest.raises(ValueError, match="0 image placeholders"):
        gen([[1, 2]], [[world.picture(1)]])
    assert gen([], None) == [] and gen([[1]], None, max_new_tokens=0) == [[]]


# The slots.

SHAPES = Shapes(extend_rows=(1, 3), decode_rows=(2, 3), lengths=(32,), patches=(64,), windows=(64,), chunk=4, merge=2)


@pytest.fixture(scope="module")
def sampler():
    forbidden_V = world.chat().forbidden_V(272)
    return Sampler(world.model(), sharding.one_device(), SHAPES, stop_ids=[], forbidden_V=forbidden_V)


def turn(sampler, extensions, copies, draws):
    plan = sampler.plan(Needs(extensions, copies, draws), more=True)
    sampler.extend(world.params(), plan, extensions)
    sampler.copy(plan, copies)
    if not draws:
        return []
    written = sampler.decode(world.params(), plan, draws, Sampling(temperature=0.0)).fetch()
    return [token_n.tolist() for token_n, _ in written]


def prompt_row(text: str, images=()):
    counts = [world.PROCESSOR.tokens(world.PROCESSOR.grid(*image.shape[:2])) for image in images]
    ids = world.chat().prompt_ids(text, counts, [])
    return make_row(np.array(ids, np.int32), [root_image(image) for image in images], CONFIG, world.pixels())


def drawing(slot: int, row, position: int, allowance: int = 4, sent: int = 0) -> Draw:
    return Draw(slot, len(row.token_T) + sent, position + sent, allowance, drawn=sent, prompt=0, sample=slot, turn=0)


def test_a_copied_prompt_is_the_prompt(sampler):
    """Slot 2 gets the prompt of slot 0, with its image, after slot 0 has gone on writing."""
    row, end = prompt_row("a", [world.picture(4, 16, 16)])
    first = turn(sampler, [Extension(0, 0, row, fresh=True)], [], [drawing(0, row, end)])[0]
    second = turn(sampler, [], [], [drawing(0, row, end, sent=4)])[0]
    copied = turn(sampler, [], [(0, 2)], [drawing(2, row, end)])[0]
    assert copied == first
    assert turn(sampler, [], [], [drawing(2, row, end, sent=4)])[0] == second


def test_a_copy_may_name_slots_that_change_places(sampler):
    """Both prompts are read before either is written."""
    rows = [prompt_row("a"), prompt_row("bc")]
    extensions = [Extension(slot, 0, row, fresh=True) for slot, (row, _) in enumerate(rows)]
    straight = turn(sampler, extensions, [], [drawing(slot, row, end) for slot, (row, end) in enumerate(rows)])
    assert straight[0] != straight[1]
    swapped = turn(sampler, [], [(0, 1), (1, 0)], [drawing(1 - slot, row, end) for slot, (row, end) in enumerate(rows)])
    assert swapped == straight


def test_a_chunk_stops_at_the_allowance_and_leaves_the_others_alone(sampler):
    rows = [prompt_row("a"), prompt_row("bc"), prompt_row("d")]
    extensions = [Extension(slot, 0, row, fresh=True) for slot, (row, _) in enumerate(rows)]
    draws = [drawing(slot, row, end) for slot, (row, end) in enumerate(rows)]
    whole = turn(sampler, extensions, [], draws)
    short = [dataclasses.replace(draw, allowance=allowance) for draw, allowance in zip(draws, (1, 4, 3), strict=True)]
    assert turn(sampler, extensions, [], short) == [whole[0][:1], whole[1], whole[2][:3]]
    # Slots 0 and 1 rest while slot 2 starts again; afterwards slot 1 goes on as if nothing had been.
    after = turn(sampler, [], [], [drawing(1, *rows[1], sent=4)])
    turn(sampler, extensions, [], draws)
    turn(sampler, extensions[2:], [], draws[2:])
    assert turn(sampler, [], [], [drawing(1, *rows[1], sent=4)]) == after


def test_an_extension_of_padding_past_the_capacity_keeps_every_token(sampler):
    """A slot of 64 places that holds 40 is given 20 more, in a call of 32: the last 8 places of the call lie past its
    end."""
    row, _ = prompt_row("x" * 3)
    ids = np.resize(row.token_T, 60)
    straight, middle = make_row(ids[:32], [], CONFIG, world.pixels())
    more, far = make_row(ids[32:40], [], CONFIG, world.pixels(), middle)
    last, after = make_row(ids[40:], [], CONFIG, world.pixels(), far)
    turn(sampler, [Extension(1, 0, straight, fresh=True)], [], [])
    turn(sampler, [Extension(1, 32, more, fresh=False)], [], [])
    piece = sampler.plan(Needs([Extension(1, 40, last, fresh=False)]), more=True).pieces[0]
    assert (piece.length, piece.window) == (32, 64)
    found = turn(sampler, [Extension(1, 40, last, fresh=False)], [], [Draw(1, 60, after, 4, 0, 0, 0, 0)])[0]
    assert found == generate(world.model(), CONFIG, [ids.tolist()], max_new_tokens=4, temperature=0.0)[0]


def test_a_round_without_needs_is_no_round(sampler):
    assert sampler.plan(Needs(), more=False) == Round(more=False, decode_window=64)
    assert jax.tree.leaves(sampler._slots())[0].shape[0] == 1  # one shard


def test_released_slots_leave_the_device_and_begin_empty(sampler):
    row, end = prompt_row("a", [world.picture(4, 16, 16)])
    needs = [Extension(0, 0, row, fresh=True)], [], [drawing(0, row, end)]
    first = turn(sampler, *needs)
    held = jax.tree.leaves(sampler._state)
    references = [weakref.ref(part) for part in held]
    del held
    sampler.release()
    assert references and not any(reference() for reference in references)
    assert not any(np.any(part) for part in jax.tree.leaves(sampler._slots()))
    assert turn(sampler, *needs) == first


def test_a_presence_penalty_holds_over_the_chunks_of_a_turn_and_ends_with_it(greedy):
    """A penalty beyond every logit: a greedy turn of 70 tokens, in calls of 64, holds none of them twice."""
    assert any(len(set(written)) < 70 for written in gen(max_new_tokens=70))
    for written in gen(max_new_tokens=70, presence_penalty=1e4):
        assert len(written) == 70 == len(set(written))
    # Six prompts in four slots: the last two are in slots whose last turn held other tokens, and begin with none.
    alone = gen(PROMPTS[:2], IMAGES[:2], presence_penalty=1e4)
    after = gen(PROMPTS + PROMPTS[:2], IMAGES + IMAGES[:2], presence_penalty=1e4)
    assert after[4:] == after[:2] == alone


def test_top_k_of_one_and_a_min_p_of_one_are_greedy(greedy):
    assert gen(temperature=1.0, top_k=1) == greedy
    assert gen(temperature=1.0, min_p=1.0) == greedy
    assert gen(temperature=1.0, top_k=10_000, seed=2) == gen(temperature=1.0, seed=2)


def test_limits_are_a_program_of_their_own_and_leave_the_usual_one_alone(greedy):
    """The usual call is not compiled again by a call with limits, and its text has nothing of them."""
    before = slots.decode_slots._cache_size()
    gen(top_k=3)
    limited = slots.decode_slots._cache_size()
    gen(top_k=5, presence_penalty=0.5)  # other numbers, the same program
    assert gen() == greedy and slots.decode_slots._cache_size() == limited
    assert limited - before <= 1
