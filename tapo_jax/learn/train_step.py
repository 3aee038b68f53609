"""Device side of learning: model -> log-probabilities -> loss -> gradients -> update, jitted over the mesh.

Rows are cut into mini-batches with a stride (row i·U + u belongs to update u), so that the samples of one group are
spread over the updates, and into micro-batches of similar length (`micro_batches.py`), all in one compiled program.
The loss of every micro-batch is divided by the token count of the whole mini-batch, so that their sum is exactly the
loss of the mini-batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs, TrainBatch
from tapo_jax.learn import losses, micro_batches
from tapo_jax.learn.logprobs import token_logp
from tapo_jax.learn.optimizer import is_trained
from tapo_jax.learn.state import TrainState, apply_gradients, updates_made
from tapo_jax.models import qwen3_vl


@dataclasses.dataclass(frozen=True)
class Policy:
    """The parts of the trained model that do not change."""

    graphdef: Any
    """The model's structure; `nnx.merge(graphdef, params)` is the model."""
    forbidden_V: Any
    """bool, tokens that the policy may not write."""
    mesh: Mesh
    """Where its programs run."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What one update minimises and how it is computed."""

    loss: losses.Settings = losses.Settings()
    kl_coef: float = 0.0
    """The weight of the KL term towards the reference model."""
    kl_estimator: str = "k3"
    importance_cap: float | None = 2.0
    """Max ratio of trainer to sampler probability (`losses.importance_weight`); None means no correction."""
    temperature: float = 1.0
    """The sampler's temperature."""
    updates_per_batch: int = 1
    micro_batches: int = 1
    remat: str = "none"
    logp_chunk: int = 128
    train_vision: bool = False
    lora: bool = False


def accumulate(
    loss_fn: Callable, params: Any, inputs: Callable, rows: Callable, count: int, buckets: micro_batches.Buckets
) -> tuple[jax.Array, dict, Any]:
    """Return (loss, metrics, gradient) over `count` micro-batches.

    Loss and gradient are sums over the micro-batches, so loss_fn must divide by counts of the mini-batch; metrics are
    stacked, [count].

    loss_fn: maps (params, a micro-batch) to (loss, metrics).
    params: what the gradient is taken of.
    inputs: maps a micro-batch to its ModelInputs.
    rows: maps an index to a micro-batch.
    count: number of micro-batches.
    buckets: ascending (tokens, patches) to which a micro-batch may be cropped.
    """
    value_and_gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def body(total: Any, index: jax.Array) -> tuple[Any, dict]:
        part = rows(index)
        compute = functools.partial(value_and_gradient, params)
        (loss, metrics), gradient = micro_batches.in_smallest_bucket(compute, buckets, inputs(part), part)
        return jax.tree.map(jnp.add, total, (loss, gradient)), metrics

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (loss, gradient), metrics = jax.lax.scan(body, zero, jnp.arange(count))
    return loss, metrics, gradient


def freeze(params: Any, *, train_vision: bool, lora: bool) -> Any:
    """Stop the gradient of parameters that are not trained, so that it is not even compiled."""

    def leaf(path: tuple, array: jax.Array) -> jax.Array:
        trained = is_trained(sharding.path_name(path), train_vision=train_vision, lora=lora)
        return array if trained else jax.lax.stop_gradient(array)

    return jax.tree_util.tree_map_with_path(leaf, params)


def row_logp(
    policy: Policy,
    params: Any,
    inputs: ModelInputs,
    *,
    temperature: float = 1.0,
    remat: str = "none",
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Return (logp_BxT, entropy_BxT) of every token under the distribution that the sampler draws from."""
    model = nnx.merge(policy.graphdef, params)
    with sharding.on(policy.mesh):
        hidden_BxTxD = qwen3_vl.hidden_states(model, inputs, remat=remat)
        hidden_BxTxD = sharding.constrain(hidden_BxTxD, "batch", None, None)
        forbidden_V = jnp.asarray(policy.forbidden_V)
        options = {"temperature": temperature, "forbidden_V": forbidden_V, "chunk": chunk}
        return token_logp(model, hidden_BxTxD, inputs.token_BxT, **options)


# Programs: each is made once for a run and compiled once for every shape.


def make_log_probs(
    policy: Policy,
    objective: Objective,
    *,
    buckets: micro_batches.Buckets | None = None,
    later_updates: bool = False,
) -> Callable:
    """Return the jitted (params, inputs) -> logp_BxT of the whole batch, in the micro-batches that the updates use.

    policy: the model.
    objective: how the updates compute log-probabilities.
    buckets: as for `make_update`.
    later_updates: compute only the rows of the second and later updates, and return 0 for the others. The first update
        of a batch needs no old log-probabilities: they equal the ones that it computes.
    """
    updates = objective.updates_per_batch
    options = {"temperature": objective.temperature, "chunk": objective.logp_chunk}

    def log_probs(params: Any, inputs: ModelInputs) -> jax.Array:
        B, T = inputs.token_BxT.shape
        sizes = buckets or [_size(inputs)]

        def compute(rows: ModelInputs) -> jax.Array:
            logp_bxt = row_logp(policy, params, rows, **options)[0]
            return jnp.pad(logp_bxt, ((0, 0), (0, T - logp_bxt.shape[1])))

        def of_update(index: jax.Array) -> jax.Array:
            mini_batch = micro_batches.strided_part(inputs, updates, index)
            return _in_micro_batches(compute, mini_batch, policy.mesh, sizes, objective.micro_batches)

        first = int(later_updates)
        logp_UxbxT = jax.lax.map(of_update, jnp.arange(first, updates))
        logp_UxbxT = jnp.pad(logp_UxbxT, ((first, 0), (0, 0), (0, 0)))
        return jnp.swapaxes(logp_UxbxT, 0, 1).reshape(B, T)

    return jax.jit(log_probs, out_shardings=sharding.rows(policy.mesh))


def _in_micro_batches(
    compute: Callable, rows: ModelInputs, mesh: Mesh, buckets: micro_batches.Buckets, least: int
) -> jax.Array:
    """Compute [rows, T] in micro-batches of similar length, and restore the order of the rows."""
    order_Sxn = micro_batches.by_length(rows, mesh, buckets)
    count = micro_batches.micro_batch_count(order_Sxn, least)

    def of_micro_batch(number: jax.Array) -> jax.Array:
        part = micro_batches.micro_batch(rows, order_Sxn, count, number)
        return micro_batches.in_smallest_bucket(compute, buckets, part, part)

    logp_MxbxT = jax.lax.map(of_micro_batch, jnp.arange(count))
    T = logp_MxbxT.shape[-1]
    if order_Sxn is None:
        return jnp.swapaxes(logp_MxbxT, 0, 1).reshape(-1, T)
    logp_SxMxkxT = jnp.swapaxes(logp_MxbxT.reshape(count, len(order_Sxn), -1, T), 0, 1)
    return micro_batches.take_rows(logp_SxMxkxT.reshape(-1, T), jnp.argsort(order_Sxn, axis=1))


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Objective,
    state: TrainState,
    *,
    buckets: micro_batches.Buckets | None = None,
) -> Callable:
    """Return the jitted (state, batch, ref_logp_BxT or None, index) -> (state, metrics), one update.

    The update uses mini-batch `index` of the batch; the state is donated. batch.advantage_BxT must be filled, and
    batch.old_logp_BxT too if a batch has more than one update. Only the later updates read it: in the first (index 0)
    the old log-probabilities are the current ones without their gradient, which costs no extra pass.

    policy: the model.
    optimizer, schedule: as from `make_optimizer`.
    objective: what the update minimises.
    state: its layout is kept.
    buckets: ascending (tokens, patches) to which a micro-batch may be cropped, the last one the batch's own size; None
        means only the batch's own size.
    """

    def update(
        state: TrainState, batch: TrainBatch, ref_logp_BxT: jax.Array | None, index: jax.Array
    ) -> tuple[TrainState, dict]:
        mini_batch = micro_batches.strided_part((batch, ref_logp_BxT), objective.updates_per_batch, index)
        denominator = losses.count(mini_batch[0].mask_BxT, losses.aggregation_of(objective.loss))

        def loss_fn(params: Any, rows: tuple[TrainBatch, jax.Array | None]) -> tuple[jax.Array, dict]:
            params = freeze(params, train_vision=objective.train_vision, lora=objective.lora)
            return micro_batch_loss(policy, params, *rows, index == 0, objective, denominator)

        sizes = buckets or [_size(batch.inputs)]
        order_Sxn = micro_batches.by_length(mini_batch[0].inputs, policy.mesh, sizes)
        count = micro_batches.micro_batch_count(order_Sxn, objective.micro_batches)
        rows = lambda number: micro_batches.micro_batch(mini_batch, order_Sxn, count, number)  # noqa: E731
        loss, metrics_M, gradient = accumulate(loss_fn, state.params, lambda part: part[0].inputs, rows, count, sizes)
        rate = schedule(updates_made(state))
        state, optimizer_metrics = apply_gradients(state, optimizer, loss, gradient)
        return state, {"loss/total": loss, "optimizer/lr": rate} | combine(metrics_M) | optimizer_metrics

    layout = jax.tree.map(lambda array: array.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(layout, sharding.replicated(policy.mesh)))


def _size(inputs: ModelInputs) -> tuple[int, int]:
    """Return (tokens, patches) of every row."""
    return inputs.token_BxT.shape[1], 0 if inputs.pixels_BxNxF is None else inputs.pixels_BxNxF.shape[1]


def micro_batch_loss(
    policy: Policy,
    params: Any,
    batch: TrainBatch,
    ref_logp_BxT: jax.Array | None,
    first: jax.Array,
    objective: Objective,
    denominator: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of one micro-batch, divided by the count of its mini-batch, and its metrics.

    The metrics are means over the micro-batch's tokens.

    policy, params: the model.
    batch: the micro-batch.
    ref_logp_BxT: the reference model's log-probabilities, for the KL term.
    first: bool, whether no update was made since the batch was played.
    objective: what the update minimises.
    denominator: `losses.count` of the mini-batch.
    """
    mask_BxT = batch.mask_BxT
    logp_BxT, entropy_BxT = row_logp(
        policy,
        params,
        batch.inputs,
        temperature=objective.temperature,
        remat=objective.remat,
        chunk=objective.logp_chunk,
    )
    old_logp_BxT = jax.lax.stop_gradient(logp_BxT)
    if objective.updates_per_batch > 1:
        old_logp_BxT = jnp.where(first, old_logp_BxT, batch.old_logp_BxT)
    weight_BxT, weight_metrics = None, {}
    if objective.importance_cap is not None:
        weight_BxT, weight_metrics = losses.importance_weight(
            old_logp_BxT, batch.sampler_logp_BxT, mask_BxT, cap=objective.importance_cap
        )
    loss, metrics = losses.policy_loss(
        logp_BxT,
        old_logp_BxT,
        batch.advantage_BxT,
        mask_BxT,
        objective.loss,
        denominator=denominator,
        weight_BxT=weight_BxT,
    )
    metrics = {f"loss/{name}": value for name, value in (metrics | weight_metrics).items()}
    metrics["loss/entropy"] = losses.aggregate(jax.lax.stop_gradient(entropy_BxT), mask_BxT)
    metrics["loss/policy_sum"] = loss
    if ref_logp_BxT is not None:
        kl_BxT = losses.kl(logp_BxT, ref_logp_BxT, objective.kl_estimator)
        metrics["loss/kl"] = losses.aggregate(jax.lax.stop_gradient(kl_BxT), mask_BxT)
        aggregation = losses.aggregation_of(objective.loss)
        loss += objective.kl_coef * losses.aggregate(kl_BxT, mask_BxT, aggregation, denominator)
    return loss, metrics


def combine(metrics_M: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Combine the metrics of micro-batches: means weighted by tokens, the max of `_max`, the sum of `_sum` and tokens.

    The max of a NaN and a number is NaN.
    """
    tokens_M = metrics_M["loss/tokens"]
    share_M = tokens_M / jnp.maximum(tokens_M.sum(), 1)
    combined = {}
    for name, value_M in metrics_M.items():
        if name.endswith("_max"):
            combined[name] = value_M.max()
        elif name.endswith(("_sum", "/tokens")):
            combined[name.removesuffix("_sum")] = value_M.sum()
        else:
            combined[name] = (value_M * share_M).sum()
    return combined


def over_updates(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of the updates on one batch: max of `_max`, last value of counters, mean of the rest."""
    merged = {}
    for name in each[0]:
        values = [float(one[name]) for one in each]
        if name.startswith("optimizer/skipped"):
            merged[name] = values[-1]
        else:
            merged[name] = float(np.max(values)) if name.endswith("_max") else float(np.mean(values))
    return merged
