"""Play one batch of simulated episodes and return it as the arrays that the trainer would make from it.

Axes: P prompts, G rollouts, B = P·G rows, K tool steps, S = G·K step slots, C = K + 2 choices, T = C tokens (one
for each choice), V = K + 1 turns (the decision is written in the turn of the first tool call, or of the guess).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tapo_jax.lab.worlds import World, right_options


class Batch(NamedTuple):
    """A batch of episodes; fields without a description are as in training."""

    question_P: jax.Array
    """Question of the pool."""
    option_BxT: jax.Array
    """The chosen option."""
    mask_BxT: jax.Array
    step_BxT: jax.Array
    turn_BxT: jax.Array
    """The turn of each token, for GiGPO."""
    success_PxG: jax.Array
    sim_PxSxS: jax.Array
    trajectory_PxS: jax.Array
    valid_PxS: jax.Array
    anchor_PxV: jax.Array
    """The state that a turn started from, for GiGPO."""
    right_PxS: jax.Array
    """Whether the step took the right option."""


def play(world: World, logits_QxCxM: jax.Array, prompts: int, group: int, key: jax.Array) -> Batch:
    """Return a batch of P questions × G rollouts, sampled from the policy's own distribution."""
    K, C, P, G = world.steps, world.choices, prompts, group
    key_question, key_option, key_luck = jax.random.split(key, 3)
    question_P = jnp.arange(P, dtype=jnp.int32) % world.questions
    if world.questions > 1:
        question_P = jax.random.permutation(key_question, jnp.arange(world.questions, dtype=jnp.int32))[question_P]
    cumulative_PxCxM = jnp.cumsum(jax.nn.softmax(logits_QxCxM, axis=2), axis=2)[question_P]
    draw_PxGxC = jax.random.uniform(key_option, (P, G, C))
    option_PxGxC = (draw_PxGxC[..., None] > cumulative_PxCxM[:, None, :, :-1]).sum(axis=3, dtype=jnp.int32)

    luck_PxGxL = jax.random.uniform(key_luck, (P, G, 2 * K + 1))
    right_PxGxC = option_PxGxC == jnp.asarray(right_options(world))[question_P][:, None, :]
    looked_PxG = option_PxGxC[:, :, 0] == 0
    unharmed_PxG = (right_PxGxC[:, :, 1:-1] | (luck_PxGxL[:, :, :K] < world.harmless)).all(axis=2)
    guessed_PxG = luck_PxGxL[:, :, 2 * K] < world.guess
    success_PxG = jnp.where(looked_PxG, unharmed_PxG & right_PxGxC[:, :, -1], guessed_PxG)

    looked_Bx1 = looked_PxG.reshape(P * G, 1)
    number_C = np.arange(C)
    step_C = np.where(number_C > K, -1, np.maximum(number_C - 1, 0))
    turn_C = np.maximum(number_C - 1, 0)
    first_C = number_C == 0
    turn_option_PxGxV = option_PxGxC[:, :, 1:]
    seen_PxGxK = 2 + turn_option_PxGxV[:, :, :-1] + world.options * np.arange(K, dtype=np.int32)[None, None, :]
    later_PxGxK = jnp.where(looked_PxG[:, :, None], seen_PxGxK, 0)
    return Batch(
        question_P=question_P,
        option_BxT=option_PxGxC.reshape(P * G, C),
        mask_BxT=looked_Bx1 | first_C[None],
        step_BxT=jnp.where(looked_Bx1, step_C[None], -1),
        turn_BxT=jnp.where(looked_Bx1 | first_C[None], turn_C[None], -1),
        success_PxG=success_PxG,
        sim_PxSxS=similarities(world, option_PxGxC[:, :, 1:-1], luck_PxGxL[:, :, K : 2 * K]),
        trajectory_PxS=jnp.broadcast_to(jnp.repeat(jnp.arange(G, dtype=jnp.int32), K), (P, G * K)),
        valid_PxS=jnp.repeat(looked_PxG, K, axis=1),
        anchor_PxV=jnp.concatenate([jnp.ones((P, G, 1), jnp.int32), later_PxGxK], axis=2).reshape(P, -1),
        right_PxS=right_PxGxC[:, :, 1:-1].reshape(P, G * K),
    )


def similarities(world: World, option_PxGxK: jax.Array, wording_PxGxK: jax.Array) -> jax.Array:
    """Return sim_PxSxS; every step has its own tool, and wording_PxGxK in 0..1 is how the call was written."""
    P, G, K = option_PxGxK.shape
    option_PxS, wording_PxS = option_PxGxK.reshape(P, G * K), wording_PxGxK.reshape(P, G * K)
    tool_S = np.arange(G * K) % K
    distance_PxSxS = jnp.abs(wording_PxS[:, :, None] - wording_PxS[:, None, :])
    alike_PxSxS = option_PxS[:, :, None] == option_PxS[:, None, :]
    sim_PxSxS = jnp.where(alike_PxSxS, 1 - world.spread * distance_PxSxS, world.overlap)
    same_tool_1xSxS = (tool_S[:, None] == tool_S[None, :])[None]
    return jnp.where(same_tool_1xSxS, sim_PxSxS, 0)


def token_logp(world: World, logits_QxCxM: jax.Array, batch: Batch) -> jax.Array:
    """Return logp_BxT of the chosen options, by products with one-hot vectors, whose gradient needs no scatter."""
    P, group = batch.success_PxG.shape
    logp_PxCxM = jax.nn.log_softmax(logits_QxCxM, axis=2)[batch.question_P]
    option_PxGxC = batch.option_BxT.reshape(P, group, world.choices)
    chosen_PxGxCxM = option_PxGxC[..., None] == np.arange(world.options)[None, None, None]
    return jnp.where(chosen_PxGxCxM, logp_PxCxM[:, None], 0).sum(axis=3).reshape(P * group, world.choices)
