"""Positions worked out on the host, against transformers' own and by hand."""

import numpy as np
import pytest
import torch
from torch_models import CONFIGS, END, IMAGE, START, conversation, torch_model
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from tapo_jax.models import positions

CONFIG = CONFIGS["grouped"]


def test_by_hand():
    """Text 0, 1 and the opening mark 2; the image's 2 × 3 blocks start at 3: time stays 3, rows 3-4, columns 3-5; the
    text goes on at 3 + max(2, 3) = 6 with the closing mark."""
    tokens = np.array([5, 6, START, *[IMAGE] * 6, END, 7])
    place, following = positions.rope_positions(tokens, np.array([[1, 4, 6]]), CONFIG)
    assert place[:, 0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7]
    assert place[:, 1].tolist() == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7]
    assert place[:, 2].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert following == 8


@pytest.mark.parametrize("grids", [[], [(1, 4, 6)], [(1, 2, 8), (1, 8, 2), (1, 6, 6)]], ids=["text", "one", "three"])
def test_conversation_equals_transformers(grids):
    tokens, _, grid = conversation(CONFIG, grids, text=4)
    ids = torch.tensor(tokens, dtype=torch.long)
    reference = torch_model("grouped").model
    expected, delta = reference.get_rope_index(
        ids, (ids == IMAGE).int(), image_grid_thw=torch.tensor(grid, dtype=torch.long) if grids else None
    )
    place, following = positions.rope_positions(tokens[0], grid, CONFIG)
    np.testing.assert_array_equal(place, expected[:, 0].T)
    assert following == tokens.shape[1] + int(delta)  # where transformers puts the first generated token


def test_turn_by_turn_equals_all_at_once():
    """An image in the middle of a conversation, the cut before it: only the start is handed on."""
    tokens, _, grid = conversation(CONFIG, [(1, 2, 6), (1, 8, 4)], text=5)
    whole, end = positions.rope_positions(tokens[0], grid, CONFIG)
    cut = int(np.flatnonzero(tokens[0] == END)[0]) + 3
    first, middle = positions.rope_positions(tokens[0, :cut], grid[:1], CONFIG)
    second, last = positions.rope_positions(tokens[0, cut:], grid[1:], CONFIG, start=middle)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    assert last == end


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, IMAGE, IMAGE], [], "no image"),
        ([1, 2], [(1, 2, 2)], "more images"),
        ([1, IMAGE, 2, IMAGE], [(1, 4, 2)], "2 placeholders in a row"),
        ([1, IMAGE], [(1, 4, 2)], "2 placeholders in a row"),
    ],
    ids=["no image", "no placeholder", "broken up", "cut short"],
)
def test_mismatch_is_an_error(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        positions.rope_positions(np.array(ids), np.array(grids), CONFIG)


@pytest.mark.parametrize("name", CONFIGS)
def test_vision_inputs_equal_transformers(name):
    vision = CONFIGS[name].vision
    grid = np.array([(1, 2, 3), (1, 5, 1), (1, 1, 1)]) * np.array([1, vision.merge, vision.merge])
    ours = positions.vision_inputs(grid, CONFIGS[name])
    theirs = torch.tensor(grid)
    np.testing.assert_array_equal(ours["patch_rowcol_Nx2"], get_vision_position_ids(theirs, vision.merge))
    corner, weight = get_vision_interpolation_indices_and_weights(
        theirs, vision.position_side, align_corners=True, spatial_merge_size=vision.merge
    )
    np.testing.assert_allclose(ours["patch_weight_Nx4"], weight, atol=1e-6)
    # An entry of weight 0 (past the table's edge) may be another one.
    used = weight.numpy() > 1e-6
    np.testing.assert_array_equal(ours["patch_corner_Nx4"][used], corner.numpy()[used])
    assert ours["patch_image_N"].tolist() == np.repeat([1, 2, 3], np.array([6, 5, 1]) * vision.merge**2).tolist()


def test_row_inputs():
    """Two rows with one and two images, the second row's tokens from column 1 on: features count within the row."""
    merge = CONFIG.vision.merge
    one, two = (1, merge, 2 * merge), (1, merge, merge)
    tokens = np.array([[START, IMAGE, IMAGE, END, 4, 0], [0, START, IMAGE, END, IMAGE, 5]])
    mask = np.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], bool)
    pixels = np.arange(16, dtype=np.float32)[:, None] * np.ones((1, CONFIG.vision.patch_features), np.float32)
    fields = positions.row_inputs(tokens, pixels, np.array([one, two, two]), mask, CONFIG)
    assert fields["feature_BxT"].tolist() == [[-1, 0, 1, -1, -1, -1], [-1, -1, 0, -1, 1, -1]]
    assert fields["pixels_BxNxF"][:, :, 0].tolist() == [list(range(8)), list(range(8, 16))]
    assert fields["patch_image_BxN"].tolist() == [[1] * 8, [1] * 4 + [2] * 4]
    assert fields["segment_BxT"].tolist() == mask.astype(int).tolist()
    assert fields["position_BxTx3"][1, :, 0].tolist() == [0, 0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="more images"):
        positions.row_inputs(tokens[:1], pixels[:12], np.array([one, two]), mask[:1], CONFIG)
    with pytest.raises(ValueError, match="12 patches, there are 16"):
        positions.row_inputs(tokens, pixels, np.array([one, two]), mask, CONFIG)
