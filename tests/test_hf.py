"""Model directories in Hugging Face form: round trips with transformers, several files, a mesh, errors with names."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from torch_models import CONFIGS, conversation, directory, models, torch_logits, torch_model
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

from tapo_jax import sharding
from tapo_jax.models import hf, parameters, published, qwen3_vl, safetensors_files
from tapo_jax.models.config import Qwen3VLConfig


def arrays(model):
    return nnx.traversals.flatten_mapping(model.arrays())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_directory_is_the_same_model_in_transformers(name, tmp_path):
    """Ours, randomly started, saved and loaded by transformers: same logits, every tensor taken from the file."""
    config = CONFIGS[name]
    model = qwen3_vl.Qwen3VL(config, rngs=nnx.Rngs(3))
    hf.save(model, config, tmp_path)
    loaded, info = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens, pixels, grid = conversation(config, [(1, 2 * config.vision.merge, config.vision.merge)])
    with torch.no_grad():
        expected = torch_logits(loaded.eval(), tokens, pixels, grid).logits
    ours = qwen3_vl.forward(model, tokens, pixels_NxF=pixels, grid_thw_Ix3=grid)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["grouped", "biased"])
def test_loaded_and_saved_again_is_bit_for_bit(name, tmp_path):
    _, model = models(name)
    hf.save(model, CONFIGS[name], tmp_path)
    again = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    for key, value in torch_model(name).state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_bfloat16(tmp_path):
    """Saved in bfloat16 from a float32 model; loaded in either dtype the numbers are the rounded ones."""
    _, model = models("grouped")
    config = CONFIGS["grouped"]
    hf.save(model, config, tmp_path, dtype="bfloat16")
    again = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    narrow, _ = hf.load(tmp_path, dtype="bfloat16")
    wide, _ = hf.load(tmp_path, dtype="float32", compute_dtype="bfloat16")
    assert narrow.dtype == wide.dtype == jnp.bfloat16
    for path, original in arrays(model).items():
        rounded = original.astype(jnp.bfloat16)
        assert arrays(narrow)[path].dtype == jnp.bfloat16 and arrays(wide)[path].dtype == jnp.float32
        np.testing.assert_array_equal(arrays(narrow)[path], rounded)
        np.testing.assert_array_equal(arrays(wide)[path], rounded.astype(jnp.float32))
    tokens, _, _ = conversation(config, [], text=6)
    with torch.no_grad():
        expected = torch_logits(again.eval(), tokens).logits.float()
    ours = np.asarray(qwen3_vl.forward(narrow, tokens))
    # Both round every intermediate value to 8 bits, at different places.
    np.testing.assert_allclose(ours, expected, atol=0.04 * float(expected.abs().max()))


def test_several_files_with_an_index(tmp_path):
    """Ours in pieces of 20 kB, read by transformers and here; and transformers' own pieces, read here."""
    reference, model = models("biased")
    config = CONFIGS["biased"]
    table = parameters.specs(config)
    hf.save(model, config, tmp_path / "ours", shard_bytes=20_000)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    for folder in ("ours", "theirs"):
        assert len(list((tmp_path / folder).glob("*.safetensors"))) > 3
        again, _ = hf.load(tmp_path / folder)
        for path in table:
            np.testing.assert_array_equal(arrays(again)[path], arrays(model)[path], err_msg=f"{folder} {path}")
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "ours")
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_onto_a_mesh():
    """2 × 2 × 2 devices: each holds its part by the rules, the whole is the same, and no read is larger than a part."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    _, plain = models("grouped")
    model, config = hf.load(directory("grouped"), mesh=mesh)
    expected = hf.param_shardings(config, mesh)
    split = 0
    for path, array in arrays(model).items():
        assert array.sharding.is_equivalent_to(expected[path], array.ndim), path
        np.testing.assert_array_equal(array, arrays(plain)[path])
        split += array.addressable_shards[0].data.size < array.size
    assert split >= 10


def test_reading_is_part_by_part(monkeypatch):
    """What is read on the way to the devices is one device's part of one parameter: an eighth where it is split."""
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    read_sizes = {}
    put = jax.make_array_from_callback

    def spy(shape, where, read):
        def counted(index):
            part = read(index)
            read_sizes.setdefault(shape, set()).add(part.size)
            return part

        return put(shape, where, counted)

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    hf.load(directory("grouped"), mesh=mesh)
    config = CONFIGS["grouped"]
    kernel = (config.layers, config.hidden, config.mlp)
    assert read_sizes[kernel] == {config.layers * config.hidden * config.mlp // 8}
    assert set(read_sizes) == {spec.shape for spec in parameters.specs(config).values()}


def damaged(tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(directory("grouped"), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.visual.merger.norm.bias"), r'"model\.visual\.merger\.norm\.bias" is missing'),
        (lambda t: t.update({"model.extra": np.zeros(3, np.float32)}), r'"model\.extra" has no place'),
        (
            lambda t: t.update({"model.language_model.norm.weight": np.zeros(7, np.float32)}),
            r'"model\.language_model\.norm\.weight" has shape \(7,\), expected \(48,\)',
        ),
        (
            lambda t: t.update({"model.language_model.norm.weight": np.zeros(48, np.int32)}),
            r'"model\.language_model\.norm\.weight" has dtype I32',
        ),
    ],
    ids=["missing", "extra", "misshapen", "no float"],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        hf.load(damaged(tmp_path, change))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hf.load(tmp_path)
    shutil.copy(Path(directory("grouped")) / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        hf.load(tmp_path)


def test_a_tied_file_may_hold_the_head_too(tmp_path):
    """Some writers store the tied table twice."""
    copy = lambda t: t.update({"lm_head.weight": t["model.language_model.embed_tokens.weight"]})  # noqa: E731
    model, _ = hf.load(damaged(tmp_path, copy))
    np.testing.assert_array_equal(model.embedding[...], models("grouped")[1].embedding[...])


def test_assets_are_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json", "notes.txt"):
        (source / name).write_text(name)
    _, model = models("grouped")
    hf.save(model, CONFIGS["grouped"], tmp_path / "out", assets=source)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "notes.txt", "preprocessor_config.json", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize("config", [*CONFIGS.values(), *published.MODELS.values()], ids=[*CONFIGS, *published.MODELS])
def test_config_round_trip(config):
    assert Qwen3VLConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_older_spelling_of_the_rotary_parameters():
    """The published config.json: rope_theta beside rope_scaling, no rope_parameters, tying in the text part."""
    raw = CONFIGS["grouped"].to_hf()
    del raw["text_config"]["rope_parameters"], raw["vision_config"]["rope_parameters"], raw["tie_word_embeddings"]
    raw["text_config"]["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
    assert Qwen3VLConfig.from_hf(raw) == CONFIGS["grouped"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(model_type="llama"), "llama"),
        (lambda raw: raw["text_config"].update(hidden_act="gelu"), "hidden_act"),
        (lambda raw: raw["text_config"]["rope_parameters"].update(rope_type="yarn"), "yarn"),
        (lambda raw: raw["text_config"]["rope_parameters"].update(mrope_section=[4, 2, 1]), "mrope_section"),
        (lambda raw: raw["vision_config"].update(out_hidden_size=4), "out_hidden_size"),
        (lambda raw: raw["vision_config"].update(deepstack_visual_indexes=[5]), "deepstack"),
    ],
    ids=["family", "activation", "rope", "sections", "width", "deepstack"],
)
def test_what_is_not_covered_is_an_error(change, message):
    raw = json.loads(json.dumps(CONFIGS["grouped"].to_hf()))
    change(raw)
    with pytest.raises(ValueError, match=message):
        Qwen3VLConfig.from_hf(raw)


def test_axes_name_every_dimension():
    for config in CONFIGS.values():
        specs = parameters.specs(config)
        assert set(specs) == set(arrays(hf.abstract(config)))
        for path, axes in parameters.logical_axes(config).items():
            assert len(axes) == len(specs[path].shape) == len(arrays(hf.abstract(config))[path].shape)
    vision = [path for path in specs if path[0] == "vision"]
    assert vision and all(path[0] == "vision" for path in vision) and len(vision) < len(specs)


@pytest.mark.parametrize("one_draw", [parameters.ONE_DRAW, 0], ids=["small", "large"])
def test_fresh_parameters(one_draw, monkeypatch):
    """Kernels: normal with the table's spread; norms 1; biases 0. Small and large models draw by different programs."""
    monkeypatch.setattr(parameters, "ONE_DRAW", one_draw)
    table = {path: spec for path, spec in parameters.specs(CONFIGS["biased"]).items() if path[0] != "vision"}
    values = parameters.create(table, jax.random.key(0), jnp.dtype(jnp.float32))
    for path, spec in table.items():
        if spec.std is None:
            assert (np.asarray(values[path]) == spec.constant).all(), path
        else:  # the spread of n normal numbers is off by 1 / sqrt(2 n)
            assert abs(float(jnp.std(values[path])) / spec.std - 1) < 4 / np.sqrt(2 * values[path].size), path
    drawn = [float(values[path].ravel()[0] / spec.std) for path, spec in table.items() if spec.std is not None]
    assert len(np.unique(np.round(drawn, 4))) == len(drawn)
    other = parameters.create(table, jax.random.key(1), jnp.dtype(jnp.float32))
    assert not np.array_equal(values[("embedding",)], other[("embedding",)])


def test_every_dtype_of_the_files(tmp_path):
    """float64, float32, float16, bfloat16 and an empty tensor, read back as written."""
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        values = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.ones(5, dtype)}
        shapes = {name: value.shape for name, value in values.items()}
        safetensors_files.write(tmp_path / "x.safetensors", shapes, np.dtype(dtype), values.__getitem__)
        for name, tensor in safetensors_files.open_all(tmp_path).items():
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(tensor, values[name])
