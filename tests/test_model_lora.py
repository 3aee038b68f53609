"""Low-rank updates: the function, its merged form, and peft's reading of the adapter are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from torch_models import CONFIGS, conversation, directory, torch_logits
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

from tapo_jax.models import hf, lora, qwen3_vl

ALL = (*lora.DECODER, *lora.VISION)


def adapted(name, modules=ALL, filled=True):
    """A model with low-rank parameters of rank 3 and scale 2; B is random where a test needs an effect."""
    model, config = hf.load(directory(name))
    lora.add(model, 3, modules=modules, alpha=6.0)
    if filled:
        state = nnx.state(model, lora.is_lora)
        rng = np.random.default_rng(0)
        nnx.update(model, jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), state))
    return model, config


def logits(model, case):
    return qwen3_vl.forward(model, case[0], pixels_NxF=case[1], grid_thw_Ix3=case[2])


def test_starts_as_the_same_function():
    model, config = adapted("grouped", filled=False)
    case = conversation(config, [(1, 4, 2)])
    plain = logits(hf.load(directory("grouped"))[0], case)
    np.testing.assert_allclose(logits(model, case), plain, atol=1e-5)  # another program: sums in another order


@pytest.mark.parametrize("name", ["biased", "deep_stacked"], ids=["unrolled", "scanned"])
def test_merged_and_peft(name, tmp_path):
    model, config = adapted(name)
    case = conversation(config, [(1, 2 * config.vision.merge, config.vision.merge)])
    expected = logits(model, case)
    plain = hf.load(directory(name))[0]
    assert np.abs(np.asarray(expected) - np.asarray(logits(plain, case))).max() > 0.05
    merged = lora.merged(model)
    assert not any(lora.is_lora(path) for path in nnx.traversals.flatten_mapping(merged.arrays()))
    np.testing.assert_allclose(logits(merged, case), expected, atol=1e-4)

    lora.save_adapter(model, config, tmp_path)
    base = Qwen3VLForConditionalGeneration.from_pretrained(directory(name))
    read = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    changed = [key for key in read.state_dict() if "lora_A" in key]
    assert len(changed) == 7 * config.layers + 4 * config.vision.depth
    with torch.no_grad():
        theirs = torch_logits(read, *case).logits
    np.testing.assert_allclose(expected, theirs, atol=1e-4)


def test_only_the_chosen_modules_and_only_they_get_gradients():
    model, _ = adapted("grouped", modules=("q", "down", "vision/fc1"))
    graph, trained, rest = nnx.split(model, lora.is_lora, nnx.Param)
    names = {"/".join(path) for path in nnx.traversals.flatten_mapping(nnx.to_pure_dict(trained))}
    assert names == {
        f"{stack}_lora_{part}" for stack in ("decoder/q", "decoder/down", "vision/blocks/fc1") for part in "ab"
    }  # fmt: skip
    case = conversation(CONFIGS["grouped"], [(1, 4, 2)])

    def loss(trained):
        return jnp.mean(logits(nnx.merge(graph, trained, rest), case) ** 2)

    gradient = jax.grad(loss)(trained)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_errors(tmp_path):
    model, config = adapted("grouped", modules=("q",))
    with pytest.raises(ValueError, match="already"):
        lora.add(model, 2)
    with pytest.raises(ValueError, match="merged"):
        hf.save(model, config, tmp_path)
    plain, _ = hf.load(directory("grouped"))
    with pytest.raises(ValueError, match='"norm"'):
        lora.add(plain, 2, modules=("q", "norm"))
    assert plain.lora_rank is None
    with pytest.raises(ValueError, match="no low-rank"):
        lora.save_adapter(plain, config, tmp_path)
