"""Episodes to arrays: the same ids, the right positions and patches, shapes from ladders, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import rollout_world as world

from tapo_jax.learn.batches import check_episode, pack, tool_steps
from tapo_jax.models.inputs import PixelStore, bucket, make_row, model_inputs
from tapo_jax.models.positions import rope_positions, vision_inputs
from tapo_jax.types import Episode, Image, ToolCall, ToolResult, Turn, root_image

CHAT, CONFIG = world.chat(), world.config()
STOP = CHAT.stop_ids[0]


def make_episode(images: int = 1, *, error: str | None = None) -> Episode:
    """Prompt with images, a turn of 5 tokens with a call, a response with an image, a turn of 3 tokens with the
    answer."""
    pixels = world.pixels()
    shown = [root_image(world.picture(i, 16, 24)) for i in range(images)]
    crop = (
        Image(shown[0].pixels[:8, :16], shown[0].root, (0, 0, 0.6, 0.5))
        if images
        else root_image(world.picture(9, 8, 16))
    )
    prompt = CHAT.prompt_ids("where?", [pixels.tokens(image) for image in shown], [])
    response = CHAT.tool_response_ids("cut", [pixels.tokens(crop)])
    token = [*prompt, 1, 2, 3, 4, STOP, *response, 5, 6, STOP]
    first, second = len(prompt), len(prompt) + 5 + len(response)
    mask_T = np.zeros(len(token), bool)
    mask_T[first : first + 5] = mask_T[second : second + 3] = True
    token_T = np.array(token, np.int32)
    places = np.flatnonzero(token_T == CHAT.image_token)
    starts = [int(at) for at in places if token_T[at - 1] == CHAT.vision_start]
    result = ToolResult("cut", (crop,), error=error)
    turns = [Turn(first, first + 5, "a", ToolCall("crop", {}), result), Turn(second, second + 3, "b")]
    logp_T = np.where(mask_T, np.float32(-1.5), np.float32(0))
    return Episode(world.prompts(1)[0], 0, token_T, mask_T, logp_T, [*shown, crop], starts, turns, "x", "answer")


def test_bucket():
    assert [bucket(n, (64, 128)) for n in (0, 1, 64, 65, 128)] == [64, 64, 64, 128, 128]
    with pytest.raises(ValueError, match="129 is larger than the largest bucket"):
        bucket(129, (64, 128))


def test_packed_rows_are_the_episodes_token_for_token():
    episodes = [make_episode(1), make_episode(0), make_episode(2)]
    batch = pack(episodes, CONFIG, world.pixels(), length=128, patches=64, steps=2)
    assert batch.inputs.token_BxT.shape == (3, 128) and batch.inputs.pixels_BxNxF.shape == (3, 64, 48)
    for b, episode in enumerate(episodes):
        count = len(episode.token_T)
        assert batch.inputs.token_BxT[b, :count].tolist() == episode.token_T.tolist()
        assert batch.inputs.segment_BxT[b].tolist() == [1] * count + [0] * (128 - count)
        assert np.array_equal(batch.mask_BxT[b, :count], episode.mask_T) and not batch.mask_BxT[b, count:].any()
        assert np.array_equal(batch.sampler_logp_BxT[b, :count], episode.sampler_logp_T)
        turn = episode.turns[0]
        # Slot 0 on the calling turn, the stop token included, and nowhere else: not on the answer, not on the response.
        assert np.flatnonzero(batch.step_BxT[b] == 0).tolist() == list(range(turn.start, turn.stop))
        assert set(batch.step_BxT[b]) == {-1, 0}
    assert batch.old_logp_BxT is None and batch.advantage_BxT is None


def test_packed_images_lie_in_order_and_their_features_at_their_placeholders():
    episode = make_episode(2)
    batch = pack([episode], CONFIG, world.pixels(), length=128, patches=64, steps=1)
    inputs = batch.inputs
    processed = [world.PROCESSOR(image.pixels) for image in episode.images]
    grids = np.array([grid for _, grid in processed])
    total = sum(len(patches) for patches, _ in processed)
    np.testing.assert_array_equal(inputs.pixels_BxNxF[0, :total], np.concatenate([patches for patches, _ in processed]))
    assert not inputs.pixels_BxNxF[0, total:].any() and not inputs.patch_image_BxN[0, total:].any()
    np.testing.assert_array_equal(inputs.patch_image_BxN[0, :total], np.repeat([1, 2, 3], [24, 24, 8]))
    expected = vision_inputs(grids, CONFIG)
    np.testing.assert_array_equal(inputs.patch_rowcol_BxNx2[0, :total], expected["patch_rowcol_Nx2"])
    np.testing.assert_array_equal(inputs.patch_weight_BxNx4[0, :total], expected["patch_weight_Nx4"])
    count = len(episode.token_T)
    position_Tx3, _ = rope_positions(episode.token_T, grids, CONFIG)
    np.testing.assert_array_equal(inputs.position_BxTx3[0, :count], position_Tx3)
    # 6 + 6 + 2 features, numbered through, exactly at the placeholders.
    places = episode.token_T == CHAT.image_token
    np.testing.assert_array_equal(inputs.feature_BxT[0, :count][places], np.arange(14))
    assert (inputs.feature_BxT[0, :count][~places] == -1).all() and (inputs.feature_BxT[0, count:] == -1).all()


def test_a_conversation_in_stretches_has_the_positions_of_the_whole():
    episode = make_episode(1)
    whole, end = make_row(episode.token_T, episode.images, CONFIG, world.pixels())
    cut = episode.turns[0].stop
    first, middle = make_row(episode.token_T[:cut], episode.images[:1], CONFIG, world.pixels())
    second, after = make_row(episode.token_T[cut:], episode.images[1:], CONFIG, world.pixels(), middle)
    assert after == end
    np.testing.assert_array_equal(np.concatenate([first.position_Tx3, second.position_Tx3]), whole.position_Tx3)


def test_only_executed_calls_are_steps():
    assert tool_steps(make_episode(error="timeout"), 3) == []
    episode = make_episode()
    assert tool_steps(episode, 3) == [episode.turns[0]] and tool_steps(episode, 0) == []
    failed = pack([make_episode(error="timeout")], CONFIG, world.pixels(), length=128, patches=64, steps=2)
    assert (failed.step_BxT == -1).all()


def test_a_batch_of_text_can_leave_the_image_fields_out():
    episode = make_episode(1)
    start = episode.turns[0].stop + 1
    text = dataclasses.replace(
        episode, token_T=np.arange(start, dtype=np.int32), mask_T=episode.mask_T[:start],
        sampler_logp_T=episode.sampler_logp_T[:start], images=[], image_start=[], turns=episode.turns[:1],
    )  # fmt: skip
    batch = pack([text], CONFIG, world.pixels(), length=128, patches=0, steps=1)
    assert batch.inputs.pixels_BxNxF is None and batch.inputs.feature_BxT is None
    with pytest.raises(ValueError, match="does not fit"):
        pack([episode], CONFIG, world.pixels(), length=128, patches=0, steps=1)


def test_a_row_that_does_not_fit_is_refused():
    episode = make_episode(1)
    with pytest.raises(ValueError, match="does not fit 16"):
        pack([episode], CONFIG, world.pixels(), length=16, patches=64, steps=1)
    with pytest.raises(ValueError, match="does not fit 128 × 8"):
        pack([episode], CONFIG, world.pixels(), length=128, patches=8, steps=1)
    row, _ = make_row(episode.token_T, episode.images, CONFIG, world.pixels())
    with pytest.raises(ValueError, match="does not fit 16"):
        model_inputs([row], length=16, patches=64, config=CONFIG)


def test_placeholders_without_their_image_are_refused():
    row, _ = make_row(make_episode(1).token_T, make_episode(1).images, CONFIG, world.pixels())
    with pytest.raises(ValueError, match="8 image placeholders for 24 patches"):
        model_inputs(
            [dataclasses.replace(row, pixels=row.pixels[:1], grids=row.grids[:1])],
            length=128,
            patches=64,
            config=CONFIG,
        )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda e: e.mask_T.__setitem__(e.turns[0].start - 1, True), "not the union of the turns"),
        (lambda e: e.mask_T.__setitem__(e.turns[1].stop - 1, False), "not the union of the turns"),
        (lambda e: e.sampler_logp_T.__setitem__(0, -1.0), "outside of the mask"),
        (lambda e: e.sampler_logp_T.__setitem__(e.turns[0].start, 0.1), "above 0"),
        (lambda e: e.images.pop(), "another length than images"),
        (lambda e: e.image_start.__setitem__(0, 0), "no placeholder"),
        (lambda e: e.token_T.__setitem__(e.turns[0].start, CHAT.image_token), "the policy wrote a placeholder"),
        (lambda e: setattr(e, "mask_T", e.mask_T[:-1]), "another length than token_T"),
        (
            lambda e: (setattr(e.turns[0], "start", 0), e.mask_T.__setitem__(slice(0, e.turns[0].stop), True)),
            "first token is in the loss",
        ),
    ],
)
def test_episodes_that_do_not_line_up_are_refused(change, problem):
    episode = make_episode(1)
    check_episode(episode, CONFIG)
    change(episode)
    with pytest.raises(ValueError, match=problem):
        check_episode(episode, CONFIG)


class Counting:
    """An image processor that counts the images that it processed."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image_HxWx3):
        self.calls += 1
        return world.PROCESSOR(image_HxWx3)


def test_an_image_is_processed_once():
    processor = Counting()
    store = PixelStore(processor)
    image = root_image(world.picture(1))
    first, _ = store(image)
    again, _ = store(Image(image.pixels.copy(), image.root))  # another object of the same pixels
    assert processor.calls == 1 and again is first
    store(Image(image.pixels.reshape(12, 48, 3), image.root))  # the same bytes in another shape
    assert processor.calls == 2


def test_patches_in_the_dtype_of_the_computation():
    """The same rounding that the model would do, half the bytes; a row without images has pixels of that kind too."""
    narrow, image = PixelStore(Counting(), dtype=jnp.bfloat16), root_image(world.picture(1))
    (pixels_NxF, _), (exact_NxF, _) = narrow(image), PixelStore(Counting())(image)
    np.testing.assert_array_equal(pixels_NxF, jnp.asarray(exact_NxF).astype(jnp.bfloat16))
    row, _ = make_row(np.array([CONFIG.image_token] * 9, np.int32), [image], CONFIG, narrow)
    for rows in ([row, None], [None]):
        inputs = model_inputs(rows, length=16, patches=64, config=CONFIG, dtype=narrow.dtype)
        assert inputs.pixels_BxNxF.dtype == jnp.bfloat16
    assert model_inputs([row], length=16, patches=64, config=CONFIG).pixels_BxNxF.dtype == np.float32


def test_old_patches_make_room():
    processor = Counting()
    store = PixelStore(processor, max_bytes=2 * 36 * 48 * 4)  # two images of 24 × 24 pixels: 36 patches of 48 float32
    a, b, c = (root_image(world.picture(seed)) for seed in range(3))
    for image in (a, b, a, c):  # b is the one unused for longest when c comes
        store(image)
    assert processor.calls == 3
    store(a)
    assert processor.calls == 3
    store(b)
    assert processor.calls == 4
