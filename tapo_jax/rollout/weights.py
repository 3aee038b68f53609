"""The weights that the sampler's programs read, made once a rollout by one compiled program, `reshard`.

The trained parameters have the layout and the precision of training, and may have low-rank updates beside them. Every
token that is drawn reads all weights, so a rollout begins with a copy that is as small and as near as it can be: cast
to the dtype of the computation, low-rank updates merged, laid out for decoding. What is so already is not copied.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from tapo_jax import sharding
from tapo_jax.models import hf, lora
from tapo_jax.models.parameters import Path, logical_axes
from tapo_jax.models.qwen3_vl import Qwen3VL

# Interpolated in its own precision (`vision.embed_patches`): a cast would change the features.
UNCAST = {("vision", "position")}


class Reshard:
    """Make the sampler's weights from the trained parameters.

    model: for its structure, config and dtype; its weights are not kept.
    mesh: the devices of the rollout, in the order of those that the parameters are on.
    """

    def __init__(self, model: Qwen3VL, mesh: Mesh):
        plain = hf.abstract(model.config, param_dtype=str(model.embedding.dtype), dtype=str(model.dtype))
        shapes = nnx.traversals.flatten_mapping(plain.arrays())
        self.graphdef = nnx.graphdef(plain)
        """The structure of the model with these weights: that of `model` without low-rank parameters."""
        self._scale, self._mesh, self._axes = model.lora_scale, mesh, logical_axes(model.config)
        self._weights = {
            path: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype if path in UNCAST else model.dtype,
                sharding=sharding.layout(mesh, self._axes[path], x.shape),
            )
            for path, x in shapes.items()
        }

    def __call__(self, params: Any) -> Any:
        """Return the weights as a nested dictionary; arrays that are as they should be are those of `params`."""
        arrays = nnx.traversals.flatten_mapping(params)
        changed = self._changed(arrays)
        made = self._program(arrays, changed)(self._read(arrays, changed)) if changed else {}
        return nnx.traversals.unflatten_mapping({path: made.get(path, arrays[path]) for path in self._weights})

    def lower(self, params: Any) -> Any:
        """Return the lowered program for shapes in place of arrays; None if the parameters are the weights."""
        arrays = nnx.traversals.flatten_mapping(params)
        changed = self._changed(arrays)
        return self._program(arrays, changed).lower(self._read(arrays, changed)) if changed else None

    def weights(self) -> Any:
        """Return the shapes of the weights with their layout."""
        return nnx.traversals.unflatten_mapping(self._weights)

    def beside(self, params: Any) -> Any:
        """Return those of the parameters that lie in memory beside the weights, by path."""
        arrays = nnx.traversals.flatten_mapping(params)
        changed = self._changed(arrays)
        return {path: x for path, x in arrays.items() if path in changed or lora.is_lora(path)}

    def _changed(self, arrays: Mapping[Path, Any]) -> tuple[Path, ...]:
        """Return the weights that are not as they should be: those that the program makes."""

        def same(path: Path, weight: jax.ShapeDtypeStruct) -> bool:
            x = arrays[path]
            placed = x.sharding.is_equivalent_to(weight.sharding, x.ndim)
            return placed and x.dtype == weight.dtype and (*path[:-1], f"{path[-1]}_lora_a") not in arrays

        return tuple(path for path, weight in self._weights.items() if not same(path, weight))

    def _read(self, arrays: Mapping[Path, Any], changed: tuple[Path, ...]) -> dict[Path, Any]:
        """Return the parameters that the program reads to make the weights `changed`."""
        names = [(*path[:-1], path[-1] + end) for path in changed for end in ("", "_lora_a", "_lora_b")]
        return {name: arrays[name] for name in names if name in arrays}

    def _program(self, arrays: Mapping[Path, Any], changed: tuple[Path, ...]) -> Any:
        ways = ((path, self._weights[path].dtype, self._stops(path, arrays[path])) for path in changed)
        return _program(tuple(ways), self._scale)

    def _stops(self, path: Path, x: Any) -> tuple[NamedSharding, ...]:
        """Return the layouts that a weight passes on its way, the last one being its own.

        It is cast where it lies, so that the links carry narrow numbers; then it is split as the rollout splits it, and
        only then gathered. In one step the compiler would gather it whole, and split it after that."""
        weight = self._weights[path]
        if x.sharding.is_equivalent_to(weight.sharding, x.ndim) or x.sharding.device_set != weight.sharding.device_set:
            return (weight.sharding,)
        halfway = sharding.layout(self._mesh, self._axes[path], weight.shape, sharding.HALFWAY)
        return x.sharding, halfway, weight.sharding


@functools.cache
def _program(ways: tuple[tuple[Path, Any, tuple[NamedSharding, ...]], ...], scale: float) -> Any:
    """Return the program that makes weights of parameters, by path.

    ways: the path, the dtype and the layouts on the way of each weight.
    scale: of the low-rank updates.
    """

    def reshard(arrays: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
        made = {}
        for path, dtype, stops in ways:
            x, update = arrays[path], lora.delta(arrays, path)
            x = (x if update is None else x.astype(jnp.float32) + scale * update).astype(dtype)
            for layout in stops[:-1]:
                x = jax.lax.with_sharding_constraint(x, layout)
            made[path] = x
        return made

    return jax.jit(reshard, out_shardings={path: stops[-1] for path, _, stops in ways})
