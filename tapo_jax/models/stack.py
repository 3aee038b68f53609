"""Run a stack of equal layers: scanned, so that compile time does not grow with depth, or unrolled if shallow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tapo_jax.models.cache import UNROLLED_LAYERS

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_stack(layer: Callable, x: jax.Array, params_L: dict, *, depth: int, remat: str = "none") -> jax.Array:
    """Apply x ← layer(x, params of layer i, i) for all layers of params_L.

    layer: gets i as a plain int if the layers are unrolled.
    x: input of the first layer.
    params_L: the layers' parameters, stacked.
    depth: layers of the whole tower, of which params_L may be a part; decides whether to unroll or to scan.
    remat: what the forward pass keeps of a layer for the backward pass, which recomputes the rest: "none" keeps all,
        "dots" the matrix products with parameters, "full" only the layer's input.

    Raises KeyError for another remat.
    """
    layers = jax.tree.leaves(params_L)[0].shape[0]
    policy = REMAT[remat]

    def step(x: jax.Array, p: dict, i: int | jax.Array) -> jax.Array:
        if remat == "none":
            return layer(x, p, i)
        # Inside a scan the compiler cannot merge the recomputation with the forward pass anyway.
        kept = jax.checkpoint(lambda x, p: layer(x, p, i), policy=policy, prevent_cse=isinstance(i, int))
        return kept(x, p)

    if depth <= UNROLLED_LAYERS:
        for i in range(layers):
            x = step(x, jax.tree.map(lambda a, i=i: a[i], params_L), i)
        return x
    return jax.lax.scan(lambda x, xs: (step(x, *xs), None), x, (params_L, jnp.arange(layers)))[0]
