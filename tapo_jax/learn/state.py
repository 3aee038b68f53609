"""The train state (parameters, the optimizer's moments, counters) and one optimizer step on it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from tapo_jax import sharding
from tapo_jax.tapo.adaptive import AdaptiveTheta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes; with the data iterator and the seed, all that a run needs to resume."""

    update: jax.Array
    """int32, updates tried."""
    params: Any
    """Nested dicts of arrays."""
    opt_state: Any
    """The optimizer's state."""
    skipped: jax.Array
    """int32, updates skipped because the loss or the gradient was not finite."""
    skipped_in_a_row: jax.Array
    """int32, how many of the latest updates were skipped in a row."""
    thresholds: AdaptiveTheta | None = None
    """TAPO's similarity thresholds of each tool if they adapt, else None."""


def split_model(model: nnx.Module) -> tuple[Any, Any]:
    """Return (graphdef, params): the static structure and a nested dict of arrays.

    `nnx.merge(graphdef, params)` makes the model of them again."""
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def init_state(
    params: Any,
    axes: Mapping,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    thresholds: AdaptiveTheta | None = None,
) -> TrainState:
    """Return a fresh state laid out over the mesh.

    params: not copied if they already have their layout.
    axes: the parameters' logical axes by path.
    optimizer: makes the moments.
    mesh: the devices.
    thresholds: TAPO's, if they adapt.
    """
    params = jax.device_put(params, sharding.parameters(params, axes, mesh))
    layout = sharding.parameters(jax.eval_shape(optimizer.init, params), axes, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=layout)(params)
    zero = lambda: sharding.put_replicated(np.int32(0), mesh)  # noqa: E731  (three buffers: the state is donated)
    return TrainState(
        update=zero(), params=params, opt_state=opt_state, skipped=zero(), skipped_in_a_row=zero(),
        thresholds=sharding.put_replicated(thresholds, mesh),
    )  # fmt: skip


def apply_gradients(
    state: TrainState, optimizer: optax.GradientTransformation, loss: jax.Array, gradient: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply one optimizer update; if the loss or a gradient is not finite, only the counters change."""
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    skipped = (~finite).astype(jnp.int32)
    state = dataclasses.replace(
        state,
        update=state.update + 1,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
    )
    metrics = {
        "optimizer/grad_norm": norm,
        "optimizer/update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
        "optimizer/skipped": state.skipped,
        "optimizer/skipped_in_a_row": state.skipped_in_a_row,
    }
    return state, metrics


def updates_made(state: TrainState) -> jax.Array:
    """Return the number of updates made: the optimizer's own count, which leaves out skipped updates."""
    return state.update - state.skipped
