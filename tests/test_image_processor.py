"""The image processor gives what transformers' PIL processor gives, bit for bit; placeholders expand as there."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.rollout.chat import Chat

TOKENIZER = Path(__file__).parents[2] / "shared" / "data" / "qwen3_tokenizer"
PUBLISHED = ImageProcessor()
SMALL = ImageProcessor(patch=8, merge=2, temporal=2, min_pixels=32 * 32, max_pixels=96 * 96)
ODD = ImageProcessor(
    patch=7,
    merge=3,
    temporal=1,
    min_pixels=21 * 21,
    max_pixels=200 * 200,
    mean=(0.48, 0.46, 0.41),
    std=(0.27, 0.26, 0.28),
)


def reference(processor: ImageProcessor) -> Qwen2VLImageProcessorPil:
    settings = {k: v for k, v in processor.to_hf().items() if not k.endswith(("_type", "_class"))}
    return Qwen2VLImageProcessorPil(**settings)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("processor", [PUBLISHED, SMALL, ODD], ids=["published", "small", "odd"])
@pytest.mark.parametrize("size", [(64, 64), (37, 120), (301, 44), (16, 18)], ids=str)
def test_bit_for_bit(processor, size):
    image = picture(*size)
    expected = reference(processor)(images=[image], return_tensors="np")
    pixels, grid = processor(image)
    assert grid == tuple(expected["image_grid_thw"][0]) == processor.grid(*size)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected["pixel_values"])


def test_already_the_right_size_is_not_resampled():
    """64 × 48 with blocks of 16 stays, so the pixels are (value / 255 − 0.5) / 0.5, first patch first."""
    processor = ImageProcessor(patch=8, merge=2, temporal=1, min_pixels=1, max_pixels=10**6)
    image = picture(64, 48)
    pixels, grid = processor(image)
    assert grid == (1, 8, 6)
    np.testing.assert_allclose(pixels[0].reshape(3, 8, 8), image[:8, :8].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    # Patches 0-3 are the first block: (0, 0), (0, 1), (1, 0), (1, 1).
    np.testing.assert_allclose(pixels[2].reshape(3, 8, 8), image[8:16, :8].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([PUBLISHED, SMALL, ODD]))
def test_size(height, width, processor):
    block = processor.patch * processor.merge
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200 times"):
            processor.size(height, width)
        return
    tall, wide = processor.size(height, width)
    assert (tall, wide) == smart_resize(height, width, block, processor.min_pixels, processor.max_pixels)
    assert processor.tokens(processor.grid(height, width)) == (tall // block) * (wide // block)


def test_wrong_images_are_errors():
    for image in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            SMALL(image)


def test_from_dir(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_dir(tmp_path)
    for processor in (SMALL, ODD):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_hf()))
        assert ImageProcessor.from_dir(tmp_path) == processor
    # The older spelling of the bounds.
    old = ODD.to_hf() | {"min_pixels": 441, "max_pixels": 1000}
    del old["size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert ImageProcessor.from_dir(tmp_path).max_pixels == 1000


@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="the Qwen3 tokenizer is not here")
def test_prompt_equals_transformers_processor():
    """A question with two images of different size through transformers' own processor: same ids, grids and pixels."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    images = [picture(40, 70), picture(90, 33, seed=1)]
    marks = "<|vision_start|><|image_pad|><|vision_end|>" * 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{marks}Which one is larger?"}], tokenize=False, add_generation_prompt=True
    )
    expected = _processor(tokenizer)(text=[text], images=images, return_tensors="np")
    chat = Chat.from_dir(TOKENIZER)
    made = [SMALL(image) for image in images]
    ids = chat.prompt_ids("Which one is larger?", [SMALL.tokens(grid) for _, grid in made], [])
    assert ids == expected["input_ids"][0].tolist()
    np.testing.assert_array_equal(np.array([grid for _, grid in made]), expected["image_grid_thw"])
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in made]), expected["pixel_values"])


def _processor(tokenizer):
    """Without the video processor, which needs torchvision."""
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.tokenizer, processor.image_processor, processor.video_processor = tokenizer, reference(SMALL), None
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    return processor
