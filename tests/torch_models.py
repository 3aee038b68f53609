"""Small random models in transformers' PyTorch form and the same ones here. Used by the parity tests."""

import functools
import tempfile

import numpy as np
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig as TorchConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

from tapo_jax.models import hf
from tapo_jax.models.config import Qwen3VLConfig, VisionConfig
from tapo_jax.models.qwen3_vl import Qwen3VL

torch.set_num_threads(1)

IMAGE, VIDEO, START, END = 90, 91, 92, 93
VOCAB = 96


def _config(text: dict, vision: dict) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        vocab=VOCAB, rope_theta=10000.0, norm_epsilon=1e-6, max_positions=4096, image_token=IMAGE, video_token=VIDEO,
        vision_start=START, vision_end=END, vision=VisionConfig(channels=3, out=text["hidden"], **vision), **text,
    )  # fmt: skip


# "grouped": query heads 4:2, tied, one deepstack layer. "biased": equal heads, untied, biases, two deepstack layers,
# merge 3, one frame in a patch. "deep": one key/value head, no deepstack, no merging, both halves deep enough (more
# than 8 layers) to be scanned. "deep_stacked": a scanned decoder with deepstack layers.
# fmt: off
CONFIGS = {
    "grouped": _config(
        dict(
            hidden=48, mlp=64, layers=2, heads=4, kv_heads=2, head_dim=16, mrope_section=(4, 2, 2),
            attention_bias=False, tied=True,
        ),
        dict(depth=2, hidden=32, mlp=48, heads=2, patch=4, merge=2, temporal=2, positions=16, deepstack=(0,)),
    ),
    "biased": _config(
        dict(
            hidden=32, mlp=40, layers=3, heads=2, kv_heads=2, head_dim=12, mrope_section=(2, 2, 2),
            attention_bias=True, tied=False,
        ),
        dict(depth=3, hidden=24, mlp=32, heads=3, patch=2, merge=3, temporal=1, positions=25, deepstack=(0, 2)),
    ),
    "deep": _config(
        dict(
            hidden=24, mlp=32, layers=9, heads=3, kv_heads=1, head_dim=8, mrope_section=(2, 1, 1),
            attention_bias=False, tied=False,
        ),
        dict(depth=10, hidden=16, mlp=24, heads=1, patch=3, merge=1, temporal=2, positions=9, deepstack=()),
    ),
    "deep_stacked": _config(
        dict(
            hidden=24, mlp=32, layers=9, heads=3, kv_heads=1, head_dim=8, mrope_section=(2, 1, 1),
            attention_bias=False, tied=False,
        ),
        dict(depth=3, hidden=16, mlp=24, heads=1, patch=2, merge=2, temporal=2, positions=49, deepstack=(1, 2)),
    ),
}
# fmt: on


@functools.cache
def torch_model(name: str) -> Qwen3VLForConditionalGeneration:
    """Norms and biases are moved away from 1 and 0, so that a parameter that is left out shows."""
    torch.manual_seed(len(name))
    model = Qwen3VLForConditionalGeneration(TorchConfig(**CONFIGS[name].to_hf())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def directory(name: str) -> str:
    path = tempfile.mkdtemp()
    torch_model(name).save_pretrained(path)
    return path


@functools.cache
def models(name: str) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VL]:
    """(transformers' model, ours loaded from the directory that transformers saved)."""
    model, config = hf.load(directory(name))
    assert config == CONFIGS[name]
    return torch_model(name), model


def conversation(config: Qwen3VLConfig, grids: list[tuple[int, int, int]], text: int = 3, seed: int = 0):
    """(tokens_1xT, pixels_NxF, grids): text, then each image between its marks and followed by text."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 90, text).tolist()
    for grid in grids:
        places = int(np.prod(grid)) // config.vision.merge**2
        ids += [START, *[IMAGE] * places, END, *rng.integers(0, 90, text).tolist()]
    patches = sum(int(np.prod(grid)) for grid in grids)
    pixels = rng.standard_normal((patches, config.vision.patch_features), np.float32)
    return np.array([ids], np.int32), pixels, np.array(grids)


def torch_logits(model: Qwen3VLForConditionalGeneration, tokens, pixels=None, grids=None, mask=None, **more):
    """Arguments as numpy; the output object of the PyTorch model (with gradients)."""
    arguments = {"input_ids": torch.tensor(np.asarray(tokens), dtype=torch.long)}
    if pixels is not None:
        arguments["pixel_values"] = torch.tensor(pixels)
        arguments["image_grid_thw"] = torch.tensor(np.asarray(grids), dtype=torch.long)
        arguments["mm_token_type_ids"] = (arguments["input_ids"] == IMAGE).int()
    if mask is not None:
        arguments["attention_mask"] = torch.tensor(np.asarray(mask), dtype=torch.long)
    return model(**arguments, **more)
