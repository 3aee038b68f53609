"""Hold the published tables of the first simulation of this kind: accuracies after some updates.

It was a plain tabular world with gradient ascent, 8 questions × 8 rollouts per update, and the gradient of an episode
summed over its tokens.
"""

from typing import Any

_METHODS = {"GRPO": {"tapo": False}, "TAPO": {}, "zero_tools": {"control": "zero_tools"}}

# K, p_g, q, step skill, reading, rate; accuracies after 30, 100, 200 (and 400) updates of the three methods.
_FIRST = (
    ((2, 0.0, 0.9, 0.6, 0.5, 0.5), (0.79, 0.96, 0.98), (0.82, 0.96, 0.98), (0.68, 0.88, 0.92)),
    ((2, 0.3, 0.5, 0.6, 0.5, 0.5), (0.50, 0.94, 0.98), (0.60, 0.95, 0.98), (0.55, 0.86, 0.92)),
    ((2, 0.5, 0.7, 0.7, 0.3, 0.5), (0.56, 0.93, 0.98), (0.65, 0.95, 0.98), (0.60, 0.87, 0.92)),
    ((3, 0.33, 0.5, 0.6, 0.3, 0.2), (0.25, 0.30, 0.32, 0.40), (0.25, 0.31, 0.36, 0.84), (0.22, 0.30, 0.66, 0.86)),
    ((2, 0.5, 0.5, 0.5, 0.3, 1.0), (0.48, 0.50, 0.52, 0.69), (0.48, 0.51, 0.58, 0.83), (0.48, 0.90, 0.95, 0.97)),
    ((2, 0.5, 0.5, 0.5, 0.3, 0.2), (0.40, 0.47, 0.49, 0.49), (0.40, 0.47, 0.49, 0.49), (0.34, 0.41, 0.63, 0.88)),
    ((3, 0.5, 0.5, 0.5, 0.3, 0.2), (0.39, 0.46, 0.48, 0.49), (0.39, 0.46, 0.48, 0.49), (0.33, 0.39, 0.42, 0.46)),
)

# Step skill, reading, rate (K = 3, guess .33, q = .5); accuracies after 50, 100, 200, 400 updates of GRPO and TAPO.
_RATES = (
    ((0.6, 0.3, 0.1), (0.25, 0.27, 0.30, 0.32), (0.24, 0.27, 0.31, 0.35)),
    ((0.6, 0.3, 0.2), (0.28, 0.30, 0.32, 0.38), (0.27, 0.31, 0.35, 0.82)),
    ((0.6, 0.3, 0.4), (0.30, 0.32, 0.40, 0.92), (0.31, 0.35, 0.78, 0.98)),
    ((0.6, 0.3, 0.8), (0.32, 0.41, 0.85, 0.99), (0.36, 0.72, 0.97, 0.99)),
    ((0.6, 0.3, 1.6), (0.43, 0.76, 0.96, 0.99), (0.65, 0.90, 0.96, 1.0)),
    ((0.7, 0.4, 0.2), (0.32, 0.42, 0.81, 0.96), (0.34, 0.57, 0.88, 0.96)),
    ((0.7, 0.4, 0.8), (0.78, 0.95, 0.98, 0.99), (0.88, 0.96, 0.99, 0.99)),
)


def rows() -> list[dict[str, Any]]:
    """Return a dict for each row of both tables: the world, the rate, the updates, the methods and their numbers."""
    out = []
    for (steps, guess, q, skill, reading, rate), *numbers in _FIRST:
        label = f"K {steps}, guess {guess}, q {q}, skill {skill}, reading {reading}, rate {rate}"
        world = {"steps": steps, "guess": guess, "q": q, "skill": skill, "reading": reading, "rate": rate}
        found = dict(zip(_METHODS, numbers, strict=True))
        at = [30, 100, 200, 400]
        out.append({"table": "first", "label": label, "at": at, "methods": _METHODS, "published": found, **world})
    for (skill, reading, rate), *numbers in _RATES:
        label = f"K 3, guess 0.33, q 0.5, skill {skill}, reading {reading}, rate {rate}"
        world = {"steps": 3, "guess": 0.33, "q": 0.5, "skill": skill, "reading": reading, "rate": rate}
        pair = {name: _METHODS[name] for name in ("GRPO", "TAPO")}
        found = dict(zip(pair, numbers, strict=True))
        at = [50, 100, 200, 400]
        out.append({"table": "rates", "label": label, "at": at, "methods": pair, "published": found, **world})
    return out
