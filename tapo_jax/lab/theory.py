"""Compute expected advantages in closed form: is looking up or guessing reinforced more?

For a large group, in units of the reward (GRPO divides by sqrt(V·(1 - V)), which changes no sign), and for tool steps
that are the same in every look-up, so that each failing one has its witness.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Expected:
    """Expected advantages of a policy."""

    accuracy: float
    """V."""
    lookup: float
    """Mean advantage of an episode that looks up, under the base algorithm."""
    guess: float
    """Mean advantage of an episode that guesses, under the base algorithm."""
    corrected: float
    """Mean advantage of the tool steps of a look-up with TAPO."""
    support: float
    """Support of the tool steps' cluster."""


def expected(guess: float, lookup: float, tools: float, *, beta: float = 0.8, alpha_min: float = 0.25) -> Expected:
    """Return the mean advantages if a guess is right with p_g, a look-up with p_t, and a share q looks up."""
    accuracy = lookup * tools + (1 - lookup) * guess
    support = lookup * tools / accuracy if accuracy > 0 else 0.0
    failing = -accuracy
    if support >= alpha_min:
        failing = min(failing + beta * support * (1 - accuracy), 0.0)
    corrected = tools * (1 - accuracy) + (1 - tools) * failing
    return Expected(accuracy, tools - accuracy, guess - accuracy, corrected, support)


def border(guess: float, lookup: float, *, tapo: bool) -> float:
    """Return the smallest p_t at which the tool steps are reinforced at least as strongly as guessing."""
    tools_X = np.linspace(0, guess, 2001)
    for tools in tools_X:
        found = expected(guess, lookup, float(tools))
        if (found.corrected if tapo else found.lookup) >= found.guess:
            return float(tools)
    return guess
