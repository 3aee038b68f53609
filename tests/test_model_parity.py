"""The model is the same function as transformers' PyTorch one, in float32. Tolerance in logits: 1e-4 (seen: 1e-5)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_models import CONFIGS, IMAGE, conversation, models, torch_logits

from tapo_jax.batch import ModelInputs
from tapo_jax.models import positions, qwen3_vl, vision
from tapo_jax.models.cache import init_cache

TOLERANCE = 1e-4


def grids(config, *blocks):
    """Patch grids of images of so many blocks: rows and columns differ."""
    return [(1, rows * config.vision.merge, columns * config.vision.merge) for rows, columns in blocks]


@pytest.mark.parametrize("name", CONFIGS)
def test_vision_tower(name):
    """Patch embedding, interpolated positions, rotation, blocks, merger, deepstack mergers; two images in one row."""
    reference, model = models(name)
    config = model.config
    tokens, pixels, grid = conversation(config, grids(config, (2, 3), (4, 1)))
    with torch.no_grad():
        expected = reference.model.visual(torch.tensor(pixels), grid_thw=torch.tensor(grid))
    inputs = ModelInputs(**jax.tree.map(jnp.asarray, positions.row_inputs(tokens, pixels, grid, None, config)))
    run = jax.jit(functools.partial(vision.features, vision=config.vision, dtype=jnp.float32))
    feature, deep = run(model.arrays()["vision"], inputs)
    np.testing.assert_allclose(feature[0], expected.pooler_output, atol=TOLERANCE)
    assert (0 if deep is None else len(deep)) == len(expected.deepstack_features) == len(config.vision.deepstack)
    for ours, theirs in zip([] if deep is None else deep, expected.deepstack_features, strict=True):
        np.testing.assert_allclose(ours[0], theirs, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("images", [(), ((2, 3),), ((1, 2), (3, 1))], ids=["text", "one image", "two images"])
def test_logits(name, images):
    reference, model = models(name)
    tokens, pixels, grid = conversation(model.config, grids(model.config, *images), text=5)
    pictures = (pixels, grid) if images else (None, None)
    with torch.no_grad():
        expected = torch_logits(reference, tokens, *pictures).logits
    ours = qwen3_vl.forward(model, tokens, pixels_NxF=pictures[0], grid_thw_Ix3=pictures[1])
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)
    assert np.abs(expected).max() > 1  # the tolerance means something


def test_logits_of_a_padded_batch():
    """Rows of different length and number of images; padding on the right and on the left."""
    reference, model = models("grouped")
    config = model.config
    one = conversation(config, grids(config, (2, 1)), text=2)
    two = conversation(config, grids(config, (1, 2), (2, 2)), text=3, seed=1)
    T = two[0].shape[1]
    short = one[0].shape[1]
    pixels, grid = np.concatenate([one[1], two[1]]), np.concatenate([one[2], two[2]])
    for start in (0, T - short):
        tokens, mask = np.zeros((2, T), np.int32), np.zeros((2, T), bool)
        tokens[0, start : start + short], tokens[1] = one[0][0], two[0][0]
        mask[0, start : start + short], mask[1] = True, True
        with torch.no_grad():
            expected = torch_logits(reference, tokens, pixels, grid, mask).logits
        ours = qwen3_vl.forward(model, tokens, pixels_NxF=pixels, grid_thw_Ix3=grid, mask_BxT=mask)
        np.testing.assert_allclose(np.asarray(ours)[mask], expected[torch.tensor(mask)], atol=TOLERANCE)


def test_far_positions():
    """Rotary frequencies are rounded as there: 1e-4 still holds 3,000 tokens into a conversation."""
    reference, model = models("grouped")
    tokens = np.random.default_rng(0).integers(0, 90, (1, 8))
    far = 3000 + np.arange(8)
    with torch.no_grad():
        place = torch.tensor(far)[None, None].expand(3, 1, 8)
        expected = reference(input_ids=torch.tensor(tokens), position_ids=place).logits
    inputs = ModelInputs(
        token_BxT=jnp.asarray(tokens), segment_BxT=jnp.ones((1, 8), jnp.int32),
        position_BxTx3=jnp.asarray(np.repeat(far[None, :, None], 3, axis=2)),
    )  # fmt: skip
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graph, state)
        return qwen3_vl.logits(model, qwen3_vl.hidden_states(model, inputs))

    ours = run(state)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(graph, state, cache, inputs):
    model = nnx.merge(graph, state)
    hidden, cache = qwen3_vl.extend(model, cache, inputs)
    return qwen3_vl.logits(model, hidden), cache


def _text(token, position):
    ones = jnp.ones((1, 1), jnp.int32)
    return ModelInputs(token * ones, ones, jnp.full((1, 1, 3), position, jnp.int32))


@pytest.mark.parametrize("name", ["biased", "deep_stacked"])
def test_greedy_generation_with_images(name):
    """Prefill with two images, then a token at a time through the cache: transformers' own tokens, every one."""
    reference, model = models(name)
    config, new = model.config, 8
    tokens, pixels, grid = conversation(config, grids(config, (2, 3), (1, 2)), text=4)
    with torch.no_grad():
        expected = reference.generate(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            pixel_values=torch.tensor(pixels),
            image_grid_thw=torch.tensor(grid),
            mm_token_type_ids=(torch.tensor(tokens) == IMAGE).int(),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
        )[0, tokens.shape[1] :].tolist()
    graph, state = nnx.split(model)
    fields = positions.row_inputs(tokens, pixels, grid, None, config)
    _, position = positions.rope_positions(tokens[0], grid, config)
    cache = init_cache(config, slots=1, capacity=tokens.shape[1] + new)
    logits, cache = _extend(graph, state, cache, ModelInputs(**jax.tree.map(jnp.asarray, fields)))
    written = [int(logits[0, -1].argmax())]
    while len(written) < new:
        logits, cache = _extend(graph, state, cache, _text(written[-1], position))
        written.append(int(logits[0, -1].argmax()))
        position += 1
    assert written == expected
    assert len(set(written)) > 1  # not one token over and over, which a broken cache could give too
