"""Initial weights that can already copy, for models too small to learn it quickly.

Copying what followed an earlier occurrence of the current token takes two heads (Olsson et al., "In-context learning
and induction heads", 2022): one writes each token's predecessor next to it, a later one looks for the current token
among the predecessors and copies the token at that position. Both are written into the weights here, weakly enough to
be trained further. From random weights a model of this size needs thousands of steps before the second head forms;
from these weights the loss on copying is halved at step 0.
"""

import numpy as np

from tapo_jax.models.config import Qwen3VLConfig


def write_copying_heads(
    params: dict, config: Qwen3VLConfig, rng: np.random.Generator, *, gain: float = 6.0, sharpness: float = 2.2
) -> None:
    """Write the two heads into layers 0 and 1, heads 0 and 1 and their key/value head 0.

    The width is split: the lower half of D holds the token (its entry 0 is 1 for every token), the upper half its
    predecessor.

    params: numpy arrays, changed in place: "embedding" [V, D], and q, k, v, o, q_norm, k_norm of "decoder" (stacked
        over layers).
    config: the model's config.
    rng: for orthogonal matrices.
    gain: scale of what the second head writes.
    sharpness: value of q_norm and k_norm, so that the max score is √A · sharpness².
    """
    decoder = params["decoder"]
    T, A = config.hidden // 2, config.head_dim
    embedding = params["embedding"]
    embedding[:, :T] = 0.35 * rng.normal(size=(config.vocab, T))
    embedding[:, T:] = 0.02 * rng.normal(size=embedding[:, T:].shape)
    embedding[:, 0] = 1.0
    for layer in (0, 1):
        decoder["q"][layer, :, 0] *= 0.02
        decoder["k"][layer, :, 0] *= 0.02
        decoder["v"][layer, :, 0] = 0.0
        decoder["o"][layer, 0] = 0.0
        decoder["o"][layer, 1] *= 0.1  # shares the key/value head
        decoder["q_norm"][layer] = decoder["k_norm"][layer] = sharpness
    read = _orthogonal(rng, T, A)
    _predecessor_head(decoder, read, config.rope_theta)
    _matching_head(decoder, read, rng, gain)


def _predecessor_head(decoder: dict, read_TxA: np.ndarray, theta: float) -> None:
    """Write the head of layer 0, which attends to the previous token.

    The constant entry of the embedding gives a query that is the key rotated back by one position, in the three fastest
    rotations: the score is Σ cos((distance − 1)·ω), largest at the previous token."""
    T, A = read_TxA.shape
    half = A // 2
    for i in range(3):
        omega = theta ** (-2 * i / A)
        decoder["k"][0, 0, 0, i] = 3.0
        decoder["q"][0, 0, 0, i], decoder["q"][0, 0, 0, half + i] = 3.0 * np.cos(omega), -3.0 * np.sin(omega)
    decoder["v"][0, 1:T, 0] = read_TxA[1:]
    decoder["o"][0, 0, :, T : T + A] = np.eye(A)


def _matching_head(decoder: dict, read_TxA: np.ndarray, rng: np.random.Generator, gain: float) -> None:
    """Write the head of layer 1, which copies the token after an earlier occurrence of the current one.

    It matches the current token (lower half) with predecessors (upper half) in the slow rotations, which hardly change
    over the length of a conversation, and copies the token at the matching position."""
    T, A = read_TxA.shape
    half = A // 2
    slow = np.r_[half // 2 : half, half + half // 2 : A]
    shared = rng.normal(size=(A, len(slow))) / np.sqrt(A)
    decoder["q"][1, 1:T, 0, slow] = 2 * (read_TxA[1:] @ shared).T
    decoder["k"][1, T : T + A, 0, slow] = 2 * shared.T
    bring = _orthogonal(rng, T, A)
    decoder["v"][1, 1:T, 0] = bring[1:]
    decoder["o"][1, 0, :, 1:T] = gain * bring[1:].T


def _orthogonal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(rows, rows)))[0][:, :columns]
