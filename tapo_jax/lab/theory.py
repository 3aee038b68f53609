"""Expected advantages in closed form: who is pushed up, looking up or guessing?

For a large group, in units of the reward (GRPO divides by sqrt(V·(1 - V)), which moves no sign), and for tool steps
that every look-up takes alike, so that each failing one has its witness.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Expected:
    """accuracy: V. lookup, guess: mean advantage of an episode that looks up, and of one that guesses, by the base
    algorithm. corrected: of the tool steps of a look-up with TAPO. support: of the tool steps' cluster."""

    accuracy: float
    lookup: float
    guess: float
    corrected: float
    support: float


def expected(guess: float, lookup: float, tools: float, *, beta: float = 0.8, alpha_min: float = 0.25) -> Expected:
    """Return the mean advantages where a guess is right with p_g, a look-up with p_t, and a share q looks up."""
    accuracy = lookup * tools + (1 - lookup) * guess
    support = lookup * tools / accuracy if accuracy > 0 else 0.0
    failing = -accuracy
    if support >= alpha_min:
        failing = min(failing + beta * support * (1 - accuracy), 0.0)
    corrected = tools * (1 - accuracy) + (1 - tools) * failing
    return Expected(accuracy, tools - accuracy, guess - accuracy, corrected, support)


def border(guess: float, lookup: float, *, tapo: bool) -> float:
    """Return the least p_t at which the tool steps are pushed up at least as hard as guessing."""
    tools_X = np.linspace(0, guess, 2001)
    for tools in tools_X:
        found = expected(guess, lookup, float(tools))
        if (found.corrected if tapo else found.lookup) >= found.guess:
            return float(tools)
    return guess
