"""Model directories as they lie on disk: the image processor, files that are missing or cut, what an export has."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import rollout_world as world
from safetensors.numpy import load_file
from torch_models import CONFIGS, directory, models
from transformers import AutoConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

from tapo_jax.config import UserError
from tapo_jax.models import hf, safetensors_files, shipped
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore
from tapo_jax.types import root_image

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


# The image processor.


def test_both_files_of_the_image_processor(tmp_path):
    """processor_config.json as transformers 5 saves it, preprocessor_config.json as before; the newer goes first."""
    old = ImageProcessor.from_dir(shipped.DIRECTORY)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    with pytest.raises(FileNotFoundError, match="no preprocessor_config"):
        ImageProcessor.from_dir(tmp_path)
    shutil.copy(shipped.DIRECTORY / "preprocessor_config.json", tmp_path)
    assert ImageProcessor.from_dir(tmp_path) == old
    newer = dataclasses.replace(old, max_pixels=8192)
    nested = {"image_processor": newer.to_hf(), "processor_class": "Qwen3VLProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert ImageProcessor.from_dir(tmp_path) == newer
    (tmp_path / "preprocessor_config.json").unlink()
    assert ImageProcessor.from_dir(tmp_path) == newer
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(shipped.DIRECTORY / name, tmp_path)
    assert shipped.model_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("field", ["patch_size", "merge_size", "image_mean", "size"])
def test_a_missing_field_of_the_image_processor_is_named(tmp_path, field):
    raw = ImageProcessor().to_hf()
    del raw[field]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=rf"preprocessor_config\.json has no {field}"):
        ImageProcessor.from_dir(tmp_path)


@pytest.mark.parametrize("asked", [1_000_000, 1024 * 1024, 65_537, 4096 * 4096 + 5])
def test_max_pixels_is_met_in_whole_blocks(asked):
    """Blocks are 32 x 32. An image of any size has no more patches than the largest shape holds."""
    limited = ImageProcessor().limited(asked)
    assert limited.max_pixels == min(asked, 4096 * 4096) // 1024 * 1024
    assert limited.max_patches * limited.patch**2 == limited.max_pixels
    store = PixelStore(limited)
    for height, width in ((5000, 5000), (3000, 400), (1000, 1000), (777, 1301), (40, 4000)):
        _, rows, columns = limited.grid(height, width)
        if rows * columns <= store.max_patches:
            assert store.tokens(root_image(np.zeros((height, width, 3), np.uint8))) == rows * columns // 4
        else:
            with pytest.raises(ValueError, match="too long for a bound"):
                store.tokens(root_image(np.zeros((height, width, 3), np.uint8)))


@pytest.mark.parametrize("asked", [65_535, 1023, 1])
def test_max_pixels_below_the_smallest_image_is_refused(asked):
    with pytest.raises(UserError, match=f"rollout.max_pixels is {asked}.*at least 65536"):
        ImageProcessor().limited(asked)


def test_a_directory_whose_bound_is_no_multiple_of_a_block():
    """As the bound of a config: the shapes are those of whole blocks."""
    odd = dataclasses.replace(world.PROCESSOR, max_pixels=24 * 24 + 7)
    store = PixelStore(odd)
    assert store.max_patches == 36 and len(store(root_image(world.picture(0, 40, 40)))[0]) <= 36


def test_an_image_without_pixels_is_refused():
    for shape in ((0, 16), (16, 0), (0, 0)):
        with pytest.raises(ValueError, match="has no pixels"):
            world.PROCESSOR.size(*shape)


# config.json and the weights.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_vl_moe"}, "a mixture of experts; dense models only"),
        ({"text_config": CONFIGS["grouped"].to_hf()["text_config"] | {"num_experts": 128}}, "a mixture of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, 'quantised.*"fp8"'),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": None}, 'expected "qwen3_vl"'),
        ({"text_config": {"hidden_act": "silu"}}, "config.json has no field 'num_attention_heads'"),
    ],
)
def test_a_model_that_is_not_covered_is_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        Qwen3VLConfig.from_hf(CONFIGS["grouped"].to_hf() | change)


def test_a_model_without_its_text_part_is_one_sentence():
    with pytest.raises(ValueError, match="no field 'text_config'"):
        Qwen3VLConfig.from_hf({"model_type": "qwen3_vl"})


@pytest.fixture
def sharded(tmp_path):
    _, model = models("grouped")
    hf.save(model, CONFIGS["grouped"], tmp_path, shard_bytes=20_000)
    return tmp_path


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_half_a_download_names_the_missing_file(sharded):
    name = shards(sharded)[2].name
    shards(sharded)[2].unlink()
    with pytest.raises(UserError, match=rf"lacks {name} \(1 of \d+ files"):
        hf.load(sharded)
    (sharded / "model.safetensors.index.json").unlink()  # the numbers in the names say the same
    with pytest.raises(UserError, match=f"lacks {name}"):
        hf.load(sharded)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_file_is_named(sharded, keep):
    file = shards(sharded)[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{file.name} is cut"):
        hf.load(sharded)


@pytest.mark.parametrize("content", [POINTER.encode(), b"<!DOCTYPE html><html></html>", b"\xff" * 64])
def test_something_else_in_the_place_of_weights_is_named(sharded, content):
    file = shards(sharded)[1]
    file.write_bytes(content)
    with pytest.raises(UserError, match=file.name) as found:
        hf.load(sharded)
    assert ("git-lfs" in str(found.value)) == (content == POINTER.encode())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_pointer_in_the_place_of_a_small_file_is_named(tmp_path, name):
    for file in shipped.DIRECTORY.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        shipped.model_directory(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "index.json is no JSON"), ("{}", "no weight_map"), ('{"weight_map": {"a": "../x.safetensors"}}', "outside")],
)
def test_a_damaged_index_is_named(sharded, content, message):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        hf.load(sharded)


def test_quantised_tensors_are_named(sharded):
    file = shards(sharded)[0]
    header, _, data = file.read_bytes().partition(b"F32")
    file.write_bytes(header + b"F8_E4M3"[:3] + data)
    with pytest.raises(ValueError, match=r"has dtype F8_.*quantised weights are not read"):
        safetensors_files.open_all(sharded)


def test_a_damaged_config_is_named(tmp_path):
    shutil.copytree(directory("grouped"), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        hf.load(tmp_path / "model")


# Export.


@pytest.fixture
def base(tmp_path):
    """A directory as they are published: bfloat16, fields that nobody here reads, a licence, templates in a folder."""
    _, model = models("grouped")
    folder = tmp_path / "base"
    hf.save(model, CONFIGS["grouped"], folder, dtype="bfloat16")
    raw = json.loads((folder / "config.json").read_text())
    del raw["dtype"]
    raw |= {"torch_dtype": "bfloat16", "transformers_version": "4.57.0"}
    raw["text_config"] |= {"dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("LICENSE", "README.md", "processor_config.json", "generation_config.json", "merges.txt", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (folder / ".gitattributes").write_text("x")
    (folder / "pytorch_model.bin").write_text("x")
    (folder / "model.safetensors.index.json.bak").write_text("x")
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_export_has_the_dtype_and_the_files_of_its_base(base, tmp_path, dtype):
    assert safetensors_files.stored_dtype(base) == "bfloat16"
    model, config = hf.load(base)  # float32 in training
    out = tmp_path / "out"
    hf.save(model, config, out, dtype=dtype, assets=base)
    assert {str(tensor.dtype) for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    kept = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    kept -= {".gitattributes", "pytorch_model.bin"}
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == kept
    assert (out / "LICENSE").read_text() == "LICENSE"
    raw, before = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
    assert raw["dtype"] == raw["text_config"]["dtype"] == dtype and "torch_dtype" not in raw
    assert raw["transformers_version"] == "4.57.0" and raw["text_config"]["bos_token_id"] == 1
    assert {key: value for key, value in raw.items() if key not in ("dtype", "text_config")} == {
        key: value for key, value in before.items() if key not in ("torch_dtype", "text_config")
    }
    (out / "generation_config.json").unlink()  # only a name in this test
    assert str(AutoConfig.from_pretrained(out).dtype) == f"torch.{dtype}"
    again = Qwen3VLForConditionalGeneration.from_pretrained(out, dtype="auto")
    assert str(again.dtype) == f"torch.{dtype}"
    back, _ = hf.load(out)
    np.testing.assert_array_equal(back.embedding[...], model.embedding[...])  # what bfloat16 held is held exactly
    assert back.embedding[...].dtype == jnp.float32


def test_a_base_of_another_shape_gives_no_config(base, tmp_path):
    _, model = models("biased")
    hf.save(model, CONFIGS["biased"], tmp_path / "out", assets=base)
    assert hf.load(tmp_path / "out")[1] == CONFIGS["biased"]


def test_links_of_a_download_cache_are_followed(base, tmp_path):
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for file in base.iterdir():
        if file.is_file():
            (cache / file.name).symlink_to(file)
    model, config = hf.load(cache)
    hf.save(model, config, tmp_path / "out", assets=cache)
    copied = tmp_path / "out" / "LICENSE"
    assert copied.read_text() == "LICENSE" and not copied.is_symlink()
