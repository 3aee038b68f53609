"""Load and save a model directory in Hugging Face form: the only file that knows the names of its tensors.

Loading reads memory-mapped files parameter by parameter and shard by shard, so a host never holds more than one
parameter's part in addition to what its devices hold. Saving writes tensor by tensor.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from tapo_jax import sharding
from tapo_jax.models import model_files, parameters, safetensors_files
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.qwen3_vl import Qwen3VL

_TEXT, _VISION = "model.language_model", "model.visual"
_TOP = {
    ("embedding",): f"{_TEXT}.embed_tokens.weight",
    ("lm_head",): "lm_head.weight",
    ("norm",): f"{_TEXT}.norm.weight",
    ("vision", "patch"): f"{_VISION}.patch_embed.proj.weight",
    ("vision", "patch_bias"): f"{_VISION}.patch_embed.proj.bias",
    ("vision", "position"): f"{_VISION}.pos_embed.weight",
}
_STACKS = {
    ("decoder",): (
        f"{_TEXT}.layers.{{}}.",
        {
            "input_norm": "input_layernorm",
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "q_norm": "self_attn.q_norm",
            "k_norm": "self_attn.k_norm",
            "mlp_norm": "post_attention_layernorm",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        },
    ),
    ("vision", "blocks"): (
        f"{_VISION}.blocks.{{}}.",
        {
            "norm1": "norm1",
            "norm2": "norm2",
            "qkv": "attn.qkv",
            "proj": "attn.proj",
            "fc1": "mlp.linear_fc1",
            "fc2": "mlp.linear_fc2",
        },
    ),
    ("vision", "merger"): (f"{_VISION}.merger.", {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}),
    ("vision", "deepstack"): (
        f"{_VISION}.deepstack_merger_list.{{}}.",
        {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"},
    ),
}
# Kernels that are [inputs, outputs] in our arrays and [outputs, inputs] in the files.
_KERNELS = {"q", "k", "v", "o", "gate", "up", "down", "qkv", "proj", "fc1", "fc2", "patch"}


def tensor_names(path: parameters.Path, spec: parameters.Spec) -> list[str]:
    """Return the names of the tensors that make up a parameter: one, or one for each layer of a stack."""
    if path in _TOP:
        return [_TOP[path]]
    prefix, modules = _STACKS[path[:-1]]
    leaf = path[-1]
    name = prefix + (f"{modules[leaf]}.weight" if leaf in modules else f"{modules[leaf.removesuffix('_bias')]}.bias")
    return [name.format(i) for i in range(spec.shape[0])] if spec.axes[0] == "layers" else [name]


def tensor_shape(path: parameters.Path, spec: parameters.Spec, config: Qwen3VLConfig) -> tuple[int, ...]:
    """Return the shape of one of those tensors in the file."""
    vision, shape = config.vision, spec.shape[1:] if spec.axes[0] == "layers" else spec.shape
    if path == ("vision", "patch"):
        return (vision.hidden, vision.channels, vision.temporal, vision.patch, vision.patch)
    inputs = 2 if path[-1] in ("o", "proj") else 1
    if path[-1] in _KERNELS:
        return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
    return (int(np.prod(shape)),) if path[-1].endswith("_bias") else shape


def load(
    path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: str = "float32", compute_dtype: str | None = None
) -> tuple[Qwen3VL, Qwen3VLConfig]:
    """Load the model of a directory (config.json and *.safetensors).

    path: the directory.
    mesh: split the parameters over it by the rules of `sharding`; None loads on one device.
    dtype: dtype of the parameters.
    compute_dtype: dtype of the computation; None means `dtype`.

    Raises FileNotFoundError, ValueError naming a tensor that is missing, unexpected or of the wrong shape, or
    UserError naming a file that is missing, cut short or only a pointer.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json")
    config = Qwen3VLConfig.from_hf(model_files.read_json(path / "config.json"))
    tensors = safetensors_files.open_all(path)
    table = parameters.specs(config)
    _check(tensors, table, config)
    model = abstract(config, param_dtype=dtype, dtype=compute_dtype or dtype)
    layouts = dict.fromkeys(table) if mesh is None else param_shardings(config, mesh)
    values = {}
    for place, spec in table.items():
        parts = [as_ours(tensors[name], place, spec) for name in tensor_names(place, spec)]
        values[place] = _put(parts, spec, jnp.dtype(dtype), layouts[place])
    return fill(model, values), config


def param_shardings(
    config: Qwen3VLConfig, mesh: jax.sharding.Mesh
) -> dict[parameters.Path, jax.sharding.NamedSharding]:
    """Return the sharding of every parameter by path; it is known before the arrays exist."""
    return {path: sharding.layout(mesh, spec.axes, spec.shape) for path, spec in parameters.specs(config).items()}


def abstract(config: Qwen3VLConfig, *, param_dtype: str = "float32", dtype: str = "float32") -> Qwen3VL:
    """Return the model with jax.ShapeDtypeStruct in place of arrays."""
    return nnx.eval_shape(
        lambda: Qwen3VL(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(param_dtype), dtype=jnp.dtype(dtype))
    )


def fill(model: Qwen3VL, values: dict[parameters.Path, jax.Array]) -> Qwen3VL:
    """Replace an abstract model's shapes by arrays, by path."""
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(values))
    nnx.update(model, state)
    return model


def save(
    model: Qwen3VL,
    config: Qwen3VLConfig,
    path: str | Path,
    *,
    dtype: str | None = None,
    assets: str | Path | None = None,
    shard_bytes: int = safetensors_files.SHARD_BYTES,
) -> None:
    """Write config.json and model.safetensors for transformers and vLLM.

    Every process of a run must call it; the first one writes.

    model, config: what to write.
    path: the directory to write to.
    dtype: dtype of the file; None is the parameters' own.
    assets: the model directory that training began from. All its files except the weights are copied (tokenizer,
        templates, image processor, generation config, licence), and fields of its config.json that are not read here
        stay.
    shard_bytes: a larger model is written in several files with an index.

    Raises ValueError for a model with low-rank parameters: merge it first (`lora.merged`).
    """
    if model.lora_rank is not None:
        raise ValueError("the model has low-rank parameters: save lora.merged(model), or use lora.save_adapter")
    path = Path(path)
    table = parameters.specs(config)
    arrays = nnx.traversals.flatten_mapping(model.arrays())
    first = jax.process_index() == 0
    out = np.dtype(jnp.dtype(dtype or arrays[("embedding",)].dtype))
    source = {name: (place, i) for place, spec in table.items() for i, name in enumerate(tensor_names(place, spec))}
    shapes = {name: tensor_shape(place, table[place], config) for name, (place, _) in source.items()}

    def read(name: str) -> np.ndarray:
        place, i = source[name]
        array = arrays[place][i] if table[place].axes[0] == "layers" else arrays[place]
        return as_theirs(_to_host(array), place, shapes[name])

    if not first:
        for name in shapes:
            read(name)
        return
    path.mkdir(parents=True, exist_ok=True)
    safetensors_files.write_all(path, shapes, out, read, shard_bytes=shard_bytes)
    began_from = Path(assets) if assets is not None and Path(assets) != path else None
    raw = _config_json(config, str(out), began_from)
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if began_from is not None:
        model_files.copy_assets(began_from, path)


def _config_json(config: Qwen3VLConfig, dtype: str, began_from: Path | None) -> dict:
    """Return the fields of config.json with `dtype`: those of `began_from` if its config is the same, else our own."""
    raw = config.to_hf()
    if began_from is not None and (began_from / "config.json").is_file():
        there = model_files.read_json(began_from / "config.json")
        if there.get("model_type") == raw["model_type"] and Qwen3VLConfig.from_hf(there) == config:
            raw = there
    for part in (raw, raw["text_config"], raw["vision_config"]):
        if part.pop("torch_dtype", None) or "dtype" in part:
            part["dtype"] = dtype
    return raw | {"dtype": dtype}


def _check(tensors: dict[str, np.ndarray], table: dict, config: Qwen3VLConfig) -> None:
    expected = {
        name: tensor_shape(place, spec, config) for place, spec in table.items() for name in tensor_names(place, spec)
    }
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys() - ({"lm_head.weight"} if config.tied else set()))
    if missing:
        raise ValueError(f'tensor "{missing[0]}" is missing ({len(missing)} missing in all)')
    if extra:
        raise ValueError(f'tensor "{extra[0]}" has no place in the model ({len(extra)} such tensors in all)')
    for name, shape in expected.items():
        if tensors[name].shape != tuple(shape):
            raise ValueError(f'tensor "{name}" has shape {tensors[name].shape}, expected {tuple(shape)}')


def as_ours(tensor: np.ndarray, path: parameters.Path, spec: parameters.Spec) -> np.ndarray:
    """Return a view of a file's tensor in our layout; splitting axes and transposing copy nothing."""
    shape = spec.shape[1:] if spec.axes[0] == "layers" else spec.shape
    return (tensor.reshape(tensor.shape[0], -1).T if path[-1] in _KERNELS else tensor).reshape(shape)


def as_theirs(array: np.ndarray, path: parameters.Path, shape: tuple[int, ...]) -> np.ndarray:
    return (array.reshape(-1, shape[0]).T if path[-1] in _KERNELS else array).reshape(shape)


def _put(parts: list[np.ndarray], spec: parameters.Spec, dtype: jnp.dtype, layout: object) -> jax.Array:
    """Make the device array of a parameter, reading one device's part from the files at a time."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if spec.axes[0] != "layers":
            return parts[0][index].astype(dtype)
        chosen = parts[index[0]]
        out = np.empty((len(chosen), *chosen[0][index[1:]].shape), dtype)
        for i, part in enumerate(chosen):
            out[i] = part[index[1:]]
        return out

    if layout is None:
        return jnp.asarray(read((slice(None),) * len(spec.shape)))
    return jax.make_array_from_callback(spec.shape, layout, read)


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
