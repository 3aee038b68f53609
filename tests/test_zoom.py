"""The zoom keeps what there is: a crop has its own pixels, and the policy's image processor alone decides its size."""

from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image as PillowImage

from tapo_jax.config import UserError, beside
from tapo_jax.data import sources
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore
from tapo_jax.tools import ToolRunner, ZoomTool
from tapo_jax.types import ToolCall, root_image

CONFIGS = str(Path(__file__).parents[1] / "configs" / "x")
PUBLISHED = ImageProcessor().limited(1024 * 1024)  # that of the recipes: 16-pixel patches, 65,536 to 1,048,576 pixels


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def zoom(pixels_HxWx3: np.ndarray, box: list[float], tool: ZoomTool | None = None):
    runner = ToolRunner([tool or ZoomTool()], workers=1, timeout_s=30, retries=0)
    return runner.run(ToolCall("image_zoom_in_tool", {"bbox_2d": box, "img_idx": 0}), [root_image(pixels_HxWx3)])[1]


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    return noise(2160, 3840)


def test_a_part_of_a_4k_picture_is_seen_pixel_by_pixel(large):
    """960 × 992 of its pixels are 30 × 31 blocks of 32: within the budget, so the patches hold them as they are."""
    crop = zoom(large, [0, 0, 250, 459.2]).images[0]
    assert np.array_equal(crop.pixels, large[:992, :960])
    patches_NxF, grid = PixelStore(PUBLISHED)(crop)
    assert grid.tolist() == [1, 62, 60] and PixelStore(PUBLISHED).tokens(crop) == 31 * 30
    first = (patches_NxF[0].reshape(3, 2, 16, 16)[:, 0].transpose(1, 2, 0) * 0.5 + 0.5) * 255
    np.testing.assert_allclose(first, large[:16, :16], atol=0.01)


def test_a_crop_beyond_the_budget_is_reduced_to_all_of_it_and_once(large):
    whole = zoom(large, [0, 0, 1000, 1000]).images[0]
    assert whole.pixels.shape == (2160, 3840, 3)  # not reduced by the tool
    tall, wide = PUBLISHED.size(2160, 3840)
    assert 0.9 * 1024**2 < tall * wide <= 1024**2


def test_a_small_crop_is_enlarged_to_what_the_model_needs_and_no_further(large):
    crop = zoom(large, [0, 0, 20, 20]).images[0]
    assert crop.pixels.shape == (44, 77, 3)
    tall, wide = PUBLISHED.size(44, 77)
    assert 65536 <= tall * wide < 1.4 * 65536
    middle = zoom(large, [0, 0, 100, 200]).images[0]  # 384 × 432 pixels
    assert middle.pixels.shape == (432, 384, 3)
    assert PUBLISHED.size(432, 384) in ((416, 384), (448, 384))  # to the next block of 32: no more


def test_a_crop_with_a_size_is_resized_as_ever():
    pixels = noise(60, 80)
    crop = zoom(pixels, [0, 0, 500, 500], ZoomTool(size=64)).images[0].pixels
    expected = PillowImage.fromarray(pixels[:30, :40]).resize((64, 48), PillowImage.Resampling.BICUBIC)
    assert np.array_equal(crop, np.asarray(expected))


def test_a_crop_that_is_too_long_for_the_model_is_refused_by_the_model_and_too_small_a_box_by_the_tool(large):
    with pytest.raises(ValueError, match="more than 200 times as long as wide"):
        PixelStore(PUBLISHED).tokens(zoom(large, [0, 0, 1000, 2]).images[0])
    assert zoom(large, [0, 0, 0.5, 0.5]).error == "bad_box"


def made(arg: str = "test", **fields) -> ConfigDict:
    c = beside(CONFIGS, "tapo_grpo.py")(arg)
    c.tools.update(names=("image_zoom_in_tool",), **fields)
    return c


def size_of(config: ConfigDict, pixels_HxWx3: np.ndarray) -> tuple[int, ...]:
    return zoom(pixels_HxWx3, [0, 0, 500, 500], sources.tools(config)[0]).images[0].pixels.shape


def test_pictures_of_data_sets_and_the_recipes_keep_their_pixels_and_atlas_its_size():
    pixels = noise(120, 160)
    assert size_of(made(source="recorded"), pixels) == (60, 80, 3)
    assert size_of(made("qwen3_vl_4b"), pixels) == (60, 80, 3)
    assert size_of(made(), pixels) == (48, 64, 3)


def test_mcp_without_a_file_is_one_sentence():
    with pytest.raises(UserError, match=r"tools\.mcp is empty: name the JSON file"):
        sources.tools(made(source="mcp"))
