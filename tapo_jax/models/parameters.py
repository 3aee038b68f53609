"""Table of every parameter of the model: its path, shape, logical axes and initial values.

The modules are built from this table, `hf.py` loads and saves by it, and the sharding rules read its logical axes.
A kernel is stored [inputs…, outputs…] with a separate axis for heads; stacked layers have a leading axis "layers".
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tapo_jax.models.config import Qwen3VLConfig, VisionConfig

Path = tuple[str, ...]
ONE_DRAW = 1 << 26


@dataclasses.dataclass(frozen=True)
class Spec:
    """A parameter's shape, logical axes and initial values."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """The logical axis of each dimension; None is never split."""
    std: float | None = None
    """Initial values are drawn from normal(0, std); None starts at `constant`."""
    constant: float = 0.0


def specs(config: Qwen3VLConfig) -> dict[Path, Spec]:
    """Return all parameters by path. An untied model has `lm_head` in addition to `embedding`."""
    V, D = config.vocab, config.hidden
    table = {("embedding",): Spec((V, D), ("vocab", "embed"), std=0.02)}
    if not config.tied:
        table[("lm_head",)] = Spec((V, D), ("vocab", "embed"), std=D**-0.5)
    table[("norm",)] = Spec((D,), ("embed",), constant=1.0)
    table.update({("decoder", name): spec for name, spec in _decoder(config).items()})
    table.update({("vision", *path): spec for path, spec in _vision(config.vision).items()})
    return table


def logical_axes(config: Qwen3VLConfig) -> dict[Path, tuple[str | None, ...]]:
    """Return the logical axes of every parameter's dimensions, by path.

    They are "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "vision_embed", "vision_heads",
    "vision_head_dim", "vision_mlp", …; None is never split."""
    return {path: spec.axes for path, spec in specs(config).items()}


def create(table: dict[Path, Spec], key: jax.Array, dtype: jnp.dtype) -> dict[Path, jax.Array]:
    """Return initial values. Normal draws are made in float32, so that a narrow dtype rounds the same numbers."""
    return dict(zip(table, _create(tuple(table.values()), key, dtype), strict=True))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _create(table: tuple[Spec, ...], key: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    if sum(math.prod(spec.shape) for spec in table) > ONE_DRAW:
        draws = [jax.random.normal(jax.random.fold_in(key, i), spec.shape) for i, spec in enumerate(table)]
    else:  # one generator in the program instead of one for each shape compiles many times faster
        ends = np.cumsum([math.prod(spec.shape) for spec in table])
        flat = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
        draws = [part.reshape(spec.shape) for part, spec in zip(flat, table, strict=True)]
    full = [jnp.full(spec.shape, spec.constant, dtype) for spec in table]
    pairs = zip(table, draws, full, strict=True)
    return [constant if spec.std is None else (spec.std * draw).astype(dtype) for spec, draw, constant in pairs]


class Stack(nnx.Module):
    """Named arrays of one part of the model; `arrays()` returns them for the functions that compute."""

    def __init__(self, values: dict[Path, jax.Array]):
        for name in sorted({path[0] for path in values if len(path) > 1}):
            setattr(self, name, Stack({path[1:]: x for path, x in values.items() if path[0] == name}))
        for path, value in values.items():
            if len(path) == 1:
                setattr(self, path[0], nnx.Param(value))

    def arrays(self) -> dict:
        """Return the parameters as a plain (nested) dictionary of arrays."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))


def _decoder(config: Qwen3VLConfig) -> dict[str, Spec]:
    L, D, M = config.layers, config.hidden, config.mlp
    H, K, A = config.heads, config.kv_heads, config.head_dim
    # The two projections that write to the residual stream start smaller, by the square root of the number of writes.
    residual = (2 * L) ** -0.5
    table = {
        "input_norm": Spec((L, D), ("layers", "embed"), constant=1.0),
        "q": Spec((L, D, H, A), ("layers", "embed", "heads", "head_dim"), std=D**-0.5),
        "k": Spec((L, D, K, A), ("layers", "embed", "kv_heads", "head_dim"), std=D**-0.5),
        "v": Spec((L, D, K, A), ("layers", "embed", "kv_heads", "head_dim"), std=D**-0.5),
        "q_norm": Spec((L, A), ("layers", None), constant=1.0),
        "k_norm": Spec((L, A), ("layers", None), constant=1.0),
        "o": Spec((L, H, A, D), ("layers", "heads", "head_dim", "embed"), std=residual * (H * A) ** -0.5),
        "mlp_norm": Spec((L, D), ("layers", "embed"), constant=1.0),
        "gate": Spec((L, D, M), ("layers", "embed", "mlp"), std=D**-0.5),
        "up": Spec((L, D, M), ("layers", "embed", "mlp"), std=D**-0.5),
        "down": Spec((L, M, D), ("layers", "mlp", "embed"), std=residual * M**-0.5),
    }
    if config.attention_bias:
        table["q_bias"] = Spec((L, H, A), ("layers", "heads", "head_dim"))
        table["k_bias"] = Spec((L, K, A), ("layers", "kv_heads", "head_dim"))
        table["v_bias"] = Spec((L, K, A), ("layers", "kv_heads", "head_dim"))
        table["o_bias"] = Spec((L, D), ("layers", "embed"))
    return table


def _vision(vision: VisionConfig) -> dict[Path, Spec]:
    L, D, M, H, A = vision.depth, vision.hidden, vision.mlp, vision.heads, vision.head_dim
    F, residual = vision.patch_features, (2 * vision.depth) ** -0.5
    blocks = {
        "norm1": Spec((L, D), ("layers", "vision_embed"), constant=1.0),
        "norm1_bias": Spec((L, D), ("layers", "vision_embed")),
        "qkv": Spec((L, D, 3, H, A), ("layers", "vision_embed", None, "vision_heads", "vision_head_dim"), std=D**-0.5),
        "qkv_bias": Spec((L, 3, H, A), ("layers", None, "vision_heads", "vision_head_dim")),
        "proj": Spec(
            (L, H, A, D), ("layers", "vision_heads", "vision_head_dim", "vision_embed"), std=residual * D**-0.5
        ),
        "proj_bias": Spec((L, D), ("layers", "vision_embed")),
        "norm2": Spec((L, D), ("layers", "vision_embed"), constant=1.0),
        "norm2_bias": Spec((L, D), ("layers", "vision_embed")),
        "fc1": Spec((L, D, M), ("layers", "vision_embed", "vision_mlp"), std=D**-0.5),
        "fc1_bias": Spec((L, M), ("layers", "vision_mlp")),
        "fc2": Spec((L, M, D), ("layers", "vision_mlp", "vision_embed"), std=residual * M**-0.5),
        "fc2_bias": Spec((L, D), ("layers", "vision_embed")),
    }
    table: dict[Path, Spec] = {
        ("patch",): Spec((F, D), (None, "vision_embed"), std=F**-0.5),
        ("patch_bias",): Spec((D,), ("vision_embed",)),
        ("position",): Spec((vision.positions, D), (None, "vision_embed"), std=0.02),
    }
    table.update({("blocks", name): spec for name, spec in blocks.items()})
    table.update({("merger", name): spec for name, spec in _merger(vision, None, D).items()})
    if vision.deepstack:
        deep = _merger(vision, len(vision.deepstack), D * vision.merge**2)
        table.update({("deepstack", name): spec for name, spec in deep.items()})
    return table


def _merger(vision: VisionConfig, count: int | None, norm: int) -> dict[str, Spec]:
    """Return the merger (count None) or the deepstack mergers, which are stacked and normalise after the reshape."""
    wide = vision.hidden * vision.merge**2
    table = {
        "norm": Spec((norm,), ("vision_embed",), constant=1.0),
        "norm_bias": Spec((norm,), ("vision_embed",)),
        "fc1": Spec((wide, wide), ("vision_embed", "vision_mlp"), std=wide**-0.5),
        "fc1_bias": Spec((wide,), ("vision_mlp",)),
        "fc2": Spec((wide, vision.out), ("vision_mlp", "embed"), std=wide**-0.5),
        "fc2_bias": Spec((vision.out,), ("embed",)),
    }
    if count is None:
        return table
    return {
        name: dataclasses.replace(spec, shape=(count, *spec.shape), axes=("layers", *spec.axes))
        for name, spec in table.items()
    }
