"""Random groups for the tests of TAPO, as numpy arrays and as raw calls."""

import numpy as np

from tapo_jax.types import Identity, Number, Region, Text

WORDS = ["eiffel", "tower", "height", "paris", "built", "café", "1889", "the", "北京", "x"]


def arrays(seed, P, G, K, quantum=None):
    """(sim, trajectory, valid, success, advantage) as float64/int/bool arrays; quantum: similarities are its multiples
    (ties)."""
    rng = np.random.default_rng(seed)
    S = G * K
    tool = rng.integers(0, 2, (P, S))
    point = rng.random((P, S, 1)) * rng.choice([0.3, 1.5], (P, 1, 1))
    sim = np.exp(-2 * np.abs(point - point.swapaxes(1, 2)))
    if quantum:
        sim = np.round(sim / quantum) * quantum
    sim = np.where(tool[:, :, None] == tool[:, None, :], sim, 0.0)
    sim[:, np.arange(S), np.arange(S)] = 1.0
    valid = rng.random((P, S)) < rng.choice([0.3, 0.8, 1.0], (P, 1))
    success = rng.random((P, G)) < rng.choice([0.0, 0.3, 0.6, 1.0], (P, 1), p=[0.1, 0.4, 0.4, 0.1])
    # The reward also has a format part, so that a success can have a negative advantage and a failure a positive one.
    reward = success + 0.5 * (rng.random((P, G)) < 0.5) * rng.choice([0.0, 1.0, 4.0], (P, 1))
    spread = reward.std(axis=1, ddof=1, keepdims=True) if G > 1 else np.zeros((P, 1))
    advantage = np.where(spread > 1e-9, (reward - reward.mean(axis=1, keepdims=True)) / (spread + 1e-6), 0.0)
    trajectory = np.broadcast_to(np.arange(S) // K, (P, S)).astype(np.int32)
    return sim, trajectory, valid, success, advantage


def groups(seed, P, G, K):
    """encode_steps' input: five tool families, missing turns, optional parameters, rollouts of unequal length."""
    rng = np.random.default_rng(seed)
    return [[[call(rng) for _ in range(rng.integers(0, K + 1))] for _ in range(G)] for _ in range(P)]


def call(rng):
    text = " ".join(rng.choice(WORDS, rng.integers(0, 5)))
    corner = np.round(rng.uniform(0, 0.3, 2), 1)
    side = np.round(rng.uniform(0.2, 0.6, 2), 1) if rng.random() < 0.9 else np.zeros(2)
    region = Region(int(rng.integers(2)), (*map(float, corner), *map(float, corner + side)))
    kind = rng.integers(6)
    if kind == 0:
        return None
    if kind == 1:
        return ("image_zoom_in_tool", (region, Text(text)) if rng.random() < 0.5 else (region,))
    if kind == 2:
        return ("text_search_tool", (Text(text),))
    if kind == 3:
        return ("calculator", (Identity(str(rng.choice(["add", "mul"]))), Number(float(rng.integers(0, 9)), 0, 4)))
    if kind == 4:
        return ("visit", (Identity(str(rng.choice(["a.org", "b.org"]))), Text(text)))
    return ("clock", ())
