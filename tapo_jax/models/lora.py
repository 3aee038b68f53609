"""Low-rank updates of chosen kernels: kernel + scale · A·B, with A and B trained instead of the kernel.

They are ordinary parameters next to the kernel they change ("q_lora_a", "q_lora_b" in the stack of "q"), with its
layers axis in front; `layers.project` applies them. The scale is alpha / rank. Source: Hu et al., LoRA, arXiv
2106.09685.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tapo_jax.models import hf, parameters, safetensors_files
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.qwen3_vl import Qwen3VL

DECODER = ("q", "k", "v", "o", "gate", "up", "down")
VISION = ("vision/qkv", "vision/proj", "vision/fc1", "vision/fc2")


def is_lora(path: tuple, value: object = None) -> bool:
    """Return whether a path is that of a low-rank parameter; usable as an nnx filter."""
    del value
    return bool(path) and str(path[-1]).endswith(("_lora_a", "_lora_b"))


def add(
    model: Qwen3VL, rank: int, *, modules: Sequence[str] = DECODER, alpha: float | None = None, seed: int = 0
) -> None:
    """Add low-rank parameters to the model, in place. A starts random and B at 0, so the function does not change.

    model: gets the parameters.
    rank: the rank of A·B.
    modules: names of DECODER and VISION.
    alpha: the scale is alpha / rank; None means alpha = rank, a scale of 1.
    seed: for A.

    Raises ValueError for another name, or if the model already has low-rank parameters.
    """
    if model.lora_rank is not None:
        raise ValueError("the model has low-rank parameters already")
    for module in modules:
        if module not in (*DECODER, *VISION):
            raise ValueError(f'"{module}" is no module for low-rank updates; take {", ".join((*DECODER, *VISION))}')
    for i, module in enumerate(modules):
        stack, name = (model.vision.blocks, module[7:]) if module in VISION else (model.decoder, module)
        kernel = stack.arrays()[name]
        axes = inputs(name)
        fan_in = int(np.prod(kernel.shape[1 : 1 + axes]))
        key = jax.random.fold_in(jax.random.key(seed), i)
        a = fan_in**-0.5 * jax.random.normal(key, (*kernel.shape[: 1 + axes], rank))
        b = jnp.zeros((kernel.shape[0], rank, *kernel.shape[1 + axes :]))
        setattr(stack, f"{name}_lora_a", nnx.Param(a.astype(kernel.dtype)))
        setattr(stack, f"{name}_lora_b", nnx.Param(b.astype(kernel.dtype)))
    model.lora_rank, model.lora_scale = rank, 1.0 if alpha is None else alpha / rank


def inputs(name: str) -> int:
    """Return how many axes of a kernel (without the layers axis) are inputs."""
    return 2 if name in ("o", "proj") else 1


def merged(model: Qwen3VL) -> Qwen3VL:
    """Return the same model without low-rank parameters, with kernel + scale · A·B as kernel."""
    arrays = nnx.traversals.flatten_mapping(model.arrays())
    values = {}
    for path in arrays:
        if not is_lora(path):
            update = delta(arrays, path)
            values[path] = arrays[path] if update is None else (arrays[path] + update).astype(arrays[path].dtype)
    plain = hf.abstract(model.config, param_dtype=str(model.embedding.dtype), dtype=str(model.dtype))
    return hf.fill(plain, values)


def delta(arrays: dict[parameters.Path, jax.Array], path: parameters.Path) -> jax.Array | None:
    """Return scale · A·B of a kernel in float32, None if it has no update.

    arrays: `model.arrays()`, flattened; the scale is in B.
    """
    a, b = (arrays.get((*path[:-1], f"{path[-1]}_lora_{part}")) for part in "ab")
    if a is None:
        return None
    return jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a.astype(jnp.float32), b.astype(jnp.float32))


def save_adapter(model: Qwen3VL, config: Qwen3VLConfig, path: str | Path, *, base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft reads them.

    model, config: the model with its low-rank parameters.
    path: the directory to write to.
    base: name or path of the base model.

    Raises ValueError if the model has no low-rank parameters.
    """
    if model.lora_rank is None:
        raise ValueError("the model has no low-rank parameters")
    path, table = Path(path), parameters.specs(config)
    arrays = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tensors, targets = {}, []
    for place, a in ((p, x) for p, x in arrays.items() if str(p[-1]).endswith("_lora_a")):
        kernel = (*place[:-1], place[-1].removesuffix("_lora_a"))
        b = arrays[(*place[:-1], f"{kernel[-1]}_lora_b")]
        names = [name.removesuffix(".weight") for name in hf.tensor_names(kernel, table[kernel])]
        targets.append(names[0].replace(".", r"\.").replace(r"\.0\.", r"\.\d+\."))
        for i, name in enumerate(names):
            a_i, b_i = (np.asarray(x[i], np.float32) for x in (a, b))
            tensors[f"base_model.model.{name}.lora_A.weight"] = a_i.reshape(-1, model.lora_rank).T
            tensors[f"base_model.model.{name}.lora_B.weight"] = b_i.reshape(model.lora_rank, -1).T
    path.mkdir(parents=True, exist_ok=True)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    safetensors_files.write(path / "adapter_model.safetensors", shapes, np.dtype(np.float32), tensors.__getitem__)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora_rank,
        "lora_alpha": model.lora_scale * model.lora_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        # One regular expression for the full name: the mergers have modules of the same names as the vision blocks.
        "target_modules": "|".join(f"(?:{target})" for target in targets),
    }
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
