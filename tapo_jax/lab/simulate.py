"""Train simulated policies, many at a time: one run is a scan over updates, and `jax.vmap` runs hundreds at once."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tapo_jax.lab import episodes, methods, worlds
from tapo_jax.lab.methods import Method
from tapo_jax.lab.worlds import World
from tapo_jax.tapo import controls

CHUNK = 128  # runs of one call: their pairwise similarities stay in the cache of a small processor
WORKERS = 2  # concurrent calls
TRACES = ("accuracy", "lookup", "skill", "reading", "corrected", "right")


@dataclasses.dataclass(frozen=True)
class Runs:
    """The traces of N runs, each array [N, updates + 1]: before the first update, and after every one.

    `corrected` and `right` are of the batch that an update is made from, so their last column repeats that of the
    update before; they are NaN if there are no steps to take a share of.
    """

    accuracy: np.ndarray
    """Accuracy of the policy, exact."""
    lookup: np.ndarray
    """The probability that the policy looks up."""
    skill: np.ndarray
    """Its mean probability of the right option at a tool step."""
    reading: np.ndarray
    """Its mean probability of the right reading."""
    corrected: np.ndarray
    """The share of failing tool steps that TAPO corrected."""
    right: np.ndarray
    """The share of the corrected steps that took the right option."""


def make_optimizer(method: Method) -> optax.GradientTransformation:
    if method.optimizer == "adam":
        return optax.adam(method.rate, b1=0.9, b2=0.95)
    return optax.sgd(method.rate)


def loss_of(
    world: World, method: Method, parameters: Any, batch: Any, advantage_BxT: Any, old_logp_BxT: Any, part: int
):
    """Return the loss of mini-batch `part`: the rows part, part + n, part + 2·n, … of the batch, as in training."""
    logits_QxCxM = worlds.policy_logits(world, parameters)
    logp_BxT = episodes.token_logp(world, logits_QxCxM, batch)
    if old_logp_BxT is None:
        old_logp_BxT = jax.lax.stop_gradient(logp_BxT)
    rows = slice(part, None, method.updates_per_batch)
    arrays = (logp_BxT, old_logp_BxT, advantage_BxT, batch.mask_BxT)
    return methods.policy_loss(method, *(array_BxT[rows] for array_BxT in arrays))


def update(world: World, method: Method, parameters: Any, state: Any, key: jax.Array) -> tuple[Any, Any, Any, Any]:
    """Play one batch and learn from it; return (parameters, optimiser's state, Batch, Credit)."""
    key_play, key_credit = jax.random.split(key)
    logits_QxCxM = worlds.policy_logits(world, parameters)
    batch = episodes.play(world, logits_QxCxM, method.prompts, method.group, key_play)
    credit = methods.assign_credit(method, batch, key_credit)
    old_logp_BxT = episodes.token_logp(world, logits_QxCxM, batch)
    optimizer = make_optimizer(method)
    for part in range(method.updates_per_batch):
        old = old_logp_BxT if part else None
        gradient = jax.grad(loss_of, argnums=2)(world, method, parameters, batch, credit.advantage_BxT, old, part)
        changes, state = optimizer.update(gradient, state)
        parameters = optax.apply_updates(parameters, changes)
    return parameters, state, batch, credit


def one_run(world: World, method: Method, seed: jax.Array, updates: int) -> dict[str, jax.Array]:
    """Return the traces of one run, [updates + 1] each."""
    key_first, key_updates = jax.random.split(jax.random.key(seed))
    parameters = worlds.first_parameters(world, key_first)
    state = make_optimizer(method).init(parameters)

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        parameters, state = carry
        measured = measure(world, parameters)
        parameters, state, batch, credit = update(world, method, parameters, state, key)
        return (parameters, state), measured | measure_credit(batch, credit)

    (parameters, _), traces = jax.lax.scan(step, (parameters, state), jax.random.split(key_updates, updates))
    last = {name: trace[-1] for name, trace in traces.items()} | measure(world, parameters)
    return {name: jnp.append(trace, last[name]) for name, trace in traces.items()}


def measure(world: World, parameters: Any) -> dict[str, jax.Array]:
    right_QxC = worlds.skills(world, worlds.policy_logits(world, parameters))
    return {
        "accuracy": worlds.accuracy(world, right_QxC),
        "lookup": right_QxC[:, 0].mean(),
        "skill": right_QxC[:, 1:-1].mean(),
        "reading": right_QxC[:, -1].mean(),
    }


def measure_credit(batch: episodes.Batch, credit: methods.Credit) -> dict[str, jax.Array]:
    failing_PxS = controls.failing_steps(batch.trajectory_PxS, batch.valid_PxS, batch.success_PxG)
    corrected_PxS = credit.corrected_PxS & failing_PxS
    return {
        "corrected": corrected_PxS.sum() / failing_PxS.sum(),
        "right": (corrected_PxS & batch.right_PxS).sum() / corrected_PxS.sum(),
    }


@functools.partial(jax.jit, static_argnames="updates")
def _many(world: World, method: Method, seed_N: jax.Array, updates: int) -> dict[str, jax.Array]:
    return jax.vmap(functools.partial(one_run, updates=updates))(world, method, seed_N)


def simulate(cells: Sequence[tuple[World, Method]], seeds: Sequence[int], updates: int) -> list[Runs]:
    """Return the Runs of every cell, one run for each seed.

    Cells with the same sizes and names share one compiled program, regardless of their numbers. A seed draws the same
    first batch in all of them, so that differences between cells are paired by seed.
    """
    kinds: dict[Any, list[int]] = {}
    for number, cell in enumerate(cells):
        leaves, structure = jax.tree.flatten(cell)
        kinds.setdefault((structure, tuple(map(np.shape, leaves))), []).append(number)
    found: list[Runs | None] = [None] * len(cells)
    for numbers in kinds.values():
        runs = _simulate_kind([cells[number] for number in numbers], seeds, updates)
        for number, one in zip(numbers, runs, strict=True):
            found[number] = one
    return found


def _simulate_kind(cells: Sequence[tuple[World, Method]], seeds: Sequence[int], updates: int) -> list[Runs]:
    size = min(CHUNK, len(cells) * len(seeds))
    stacked = jax.tree.map(lambda *leaf: np.repeat(np.asarray(leaf, np.float32), len(seeds), axis=0), *cells)
    seed_N = np.tile(np.asarray(seeds, np.int32), len(cells))
    total = len(seed_N)
    index_N = np.arange(-(-total // size) * size) % total  # the last call is padded with runs that are dropped

    def call(start: int) -> dict[str, np.ndarray]:
        index_n = index_N[start : start + size]
        world, method = jax.tree.map(lambda leaf_N: leaf_N[index_n], stacked)
        return jax.tree.map(np.asarray, _many(world, method, seed_N[index_n], updates))

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(call, range(0, len(index_N), size)))
    traces = {name: np.concatenate([part[name] for part in parts])[:total] for name in TRACES}
    per_cell = {name: trace.reshape(len(cells), len(seeds), -1) for name, trace in traces.items()}
    return [Runs(**{name: trace[number] for name, trace in per_cell.items()}) for number in range(len(cells))]
