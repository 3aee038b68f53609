"""Define worlds of tool use that are small enough to train thousands of policies in, and the policies in them.

An episode: the policy decides to look something up or to guess. A guess is right with a fixed probability. A look-up is
K tool steps of M options each, one of them right, then a reading of the results, M options again; it succeeds if no
step did harm and the reading is right.

Axes: Q questions that a policy can tell apart, P of them in a batch, G rollouts, C = K + 2 choices of an episode (look
up or guess, K tool steps, the reading), M options, F features, H hidden units.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

POLICIES = ("table", "network")
LOWEST = 1e-4  # a probability that the policy starts with is in [LOWEST, 1 - LOWEST]
FORBIDDEN = -1e9
EMBEDDING, HIDDEN = 16, 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class World:
    """A world and the policy that training starts from. Numbers may be arrays that `jax.vmap` maps over.

    Raises ValueError for an unknown policy and for impossible sizes.
    """

    guess: Any = 1 / 3
    """p_g: the probability that a guess is right, regardless of what the policy learns."""
    lookup: Any = 0.5
    """q: the probability that the first policy looks up."""
    skill: Any = 0.6
    """The first policy's probability of the right option at a tool step; one number, or one for each step."""
    reading: Any = 0.3
    """The first policy's probability of the right reading."""
    harmless: Any = 0.0
    """The probability that a wrong step does no harm, so that a successful episode may have wrong witnesses."""
    spread: Any = 0.0
    """How freely a call is written: two calls of the same option have similarity 1 - spread·|u - u'|, u uniform."""
    overlap: Any = 0.0
    """The similarity of two calls of different options of a step."""
    sharing: Any = 0.0
    """The share of a step's squared gradient that moves all tool steps alike (policy "table")."""
    steps: int = dataclasses.field(default=3, metadata={"static": True})
    """K, the tool steps of a look-up."""
    options: int = dataclasses.field(default=8, metadata={"static": True})
    """M, the options of a step and of the reading."""
    policy: str = dataclasses.field(default="table", metadata={"static": True})
    """"table": one logit for each option, the same for all questions. "network": one hidden layer over an embedding of
    the question and the step; each question has its own right options."""
    pool: int = dataclasses.field(default=32, metadata={"static": True})
    """Q of the policy "network"."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; known: {', '.join(POLICIES)}")
        if self.steps < 1 or self.options < 2 or self.pool < 1:
            raise ValueError(f"steps {self.steps}, options {self.options}, pool {self.pool}: at least 1, 2 and 1")

    @property
    def choices(self) -> int:
        """Return C, the number of choices of an episode."""
        return self.steps + 2

    @property
    def questions(self) -> int:
        """Return Q, the number of questions that a policy can tell apart."""
        return self.pool if self.policy == "network" else 1


def tool_success(world: World) -> Any:
    """Return p_t: the probability that a look-up of the first policy succeeds."""
    skill_K = jnp.broadcast_to(jnp.asarray(world.skill), (world.steps,))
    return jnp.prod(skill_K + (1 - skill_K) * world.harmless) * world.reading


def right_options(world: World) -> np.ndarray:
    """Return right_QxC: the right option of each choice. Option 0 of the first choice is to look up."""
    right_QxC = np.zeros((world.questions, world.choices), np.int32)
    if world.policy == "network":
        right_QxC[:, 1:] = np.random.default_rng(0).integers(0, world.options, right_QxC[:, 1:].shape)
    return right_QxC


def first_logits(world: World) -> jax.Array:
    """Return base_QxCxM: the logits of the first policy. The first choice has only two allowed options."""
    skill_K = jnp.broadcast_to(jnp.asarray(world.skill), (world.steps,))
    right_C = jnp.concatenate(
        [jnp.stack([jnp.asarray(world.lookup)]), skill_K, jnp.stack([jnp.asarray(world.reading)])]
    )
    right_C = jnp.clip(right_C.astype(jnp.float32), LOWEST, 1 - LOWEST)
    others_C = jnp.array([1] + [world.options - 1] * (world.steps + 1))
    is_right_QxCxM = right_options(world)[:, :, None] == np.arange(world.options)
    right_1xCx1, wrong_1xCx1 = right_C[None, :, None], ((1 - right_C) / others_C)[None, :, None]
    base_QxCxM = jnp.log(jnp.where(is_right_QxCxM, right_1xCx1, wrong_1xCx1))
    return base_QxCxM.at[:, 0, 2:].set(FORBIDDEN)


def first_parameters(world: World, key: jax.Array) -> dict[str, jax.Array]:
    """Return the trained parameters: changes of the logits, zero at first."""
    if world.policy == "table":
        return {"own_CxM": jnp.zeros((world.choices, world.options)), "shared_M": jnp.zeros(world.options)}
    features = EMBEDDING + world.choices
    return {
        "in_FxH": jax.random.normal(key, (features, HIDDEN)),
        "out_HxM": jnp.zeros((HIDDEN, world.options)),
    }


def policy_logits(world: World, parameters: dict[str, jax.Array]) -> jax.Array:
    """Return logits_QxCxM. Looking up or guessing is one logit: that of guessing is not trained."""
    base_QxCxM = first_logits(world)
    trained_1xCxM = np.ones((1, world.choices, world.options), np.float32)
    trained_1xCxM[:, 0, 1:] = 0
    if world.policy == "table":
        is_tool_Cx1 = (np.arange(world.choices) % (world.choices - 1) > 0)[:, None]
        own_share_Cx1 = jnp.where(is_tool_Cx1, jnp.sqrt(1 - jnp.asarray(world.sharing, jnp.float32)), 1.0)
        shared_share_Cx1 = jnp.where(is_tool_Cx1, jnp.sqrt(jnp.asarray(world.sharing, jnp.float32)), 0.0)
        change_CxM = own_share_Cx1 * parameters["own_CxM"] + shared_share_Cx1 * parameters["shared_M"][None]
        return base_QxCxM + trained_1xCxM * change_CxM[None]
    hidden_QxCxH = jnp.tanh(jnp.einsum("qcf,fh->qch", question_features(world), parameters["in_FxH"]))
    change_QxCxM = jnp.einsum("qch,hm->qcm", hidden_QxCxH, parameters["out_HxM"]) / np.sqrt(HIDDEN)
    return base_QxCxM + trained_1xCxM * change_QxCxM


def question_features(world: World) -> np.ndarray:
    """Return x_QxCxF: a random unit vector for each question, concatenated with a one-hot vector of the choice."""
    question_QxE = np.random.default_rng(1).normal(size=(world.questions, EMBEDDING))
    question_QxE /= np.linalg.norm(question_QxE, axis=1, keepdims=True)
    question_QxCxE = np.broadcast_to(question_QxE[:, None, :], (world.questions, world.choices, EMBEDDING))
    choice_QxCxC = np.broadcast_to(np.eye(world.choices), (world.questions, world.choices, world.choices))
    return np.concatenate([question_QxCxE, choice_QxCxC], axis=2).astype(np.float32)


def skills(world: World, logits_QxCxM: jax.Array) -> jax.Array:
    """Return right_QxC: the probability of the right option of each choice."""
    probability_QxCxM = jax.nn.softmax(logits_QxCxM, axis=2)
    is_right_QxCxM = right_options(world)[:, :, None] == np.arange(world.options)
    return jnp.where(is_right_QxCxM, probability_QxCxM, 0).sum(axis=2)


def accuracy(world: World, right_QxC: jax.Array) -> jax.Array:
    """Return the probability that an episode succeeds, exactly: q·p_t + (1 - q)·p_g, the mean over questions."""
    step_QxK = right_QxC[:, 1:-1]
    tool_Q = jnp.prod(step_QxK + (1 - step_QxK) * world.harmless, axis=1) * right_QxC[:, -1]
    return (right_QxC[:, 0] * tool_Q + (1 - right_QxC[:, 0]) * world.guess).mean()
