"""Count a model's flops and look up those of chips: the two sides of model flops utilisation (MFU).

Counted are the multiplications and additions (2 for each pair) of the matrix products and of attention over the pairs
that the masks allow; norms, softmax, rotations and look-ups are left out, as usual in MFU. A backward pass counts
twice its forward pass; what rematerialisation recomputes does not count. All numbers are plain Python: no arrays, no
jax import.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from tapo_jax.models.config import Qwen3VLConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax sees it."""

    name: str
    flops: float
    """Dense bfloat16 flops a second."""
    bandwidth: float
    """Memory bandwidth, bytes a second."""
    memory: float
    """Bytes."""
    interconnect: float = 0.0
    """Bytes a second that it can send to its neighbours; 0 means unknown."""


GIB = 2.0**30

# A part of jax's device_kind -> the device; the first match is taken. Sources:
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (interconnect: half of the bidirectional figure), NVIDIA's data
# sheets of the SXM forms. A TPU7x chip is two devices to jax.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip("v4", 275e12, 1228e9, 32 * GIB, 300e9),
    "TPU v5 lite": Chip("v5e", 197e12, 819e9, 16 * GIB, 200e9),
    "TPU v5": Chip("v5p", 459e12, 2765e9, 95 * GIB, 600e9),
    "TPU v6": Chip("v6e", 918e12, 1638e9, 32 * GIB, 400e9),
    "TPU7x": Chip("tpu7x", 2307e12 / 2, 7380e9 / 2, 96 * GIB, 600e9 / 2),
    "H200": Chip("H200", 989e12, 4800e9, 141e9),
    "H100": Chip("H100", 989e12, 3350e9, 80e9),
    "A100-SXM4-40GB": Chip("A100-40GB", 312e12, 1555e9, 40e9),
    "A100": Chip("A100", 312e12, 2039e9, 80e9),
}


def chip(device_kind: str) -> Chip | None:
    """Return the table's entry for a `jax.Device.device_kind`, None for a device that is not in it (a CPU)."""
    return next((entry for part, entry in CHIPS.items() if part in device_kind), None)


# Forward passes.


def causal_pairs(lengths: Iterable[int]) -> int:
    """Count the query-key pairs of causal attention in segments of these lengths: Σ n (n + 1) / 2."""
    return sum(n * (n + 1) // 2 for n in lengths)


def full_pairs(lengths: Iterable[int]) -> int:
    """Count the query-key pairs of attention in both directions in segments of these lengths: Σ n²."""
    return sum(n * n for n in lengths)


def decoder(config: Qwen3VLConfig, *, tokens: int, pairs: int, logits: int) -> float:
    """Count the flops of the decoder.

    tokens: number of tokens.
    pairs: query-key pairs of attention.
    logits: number of tokens for which logits are computed.
    """
    D, A = config.hidden, config.head_dim
    attention = D * A * (2 * config.heads + 2 * config.kv_heads)  # q and o, k and v
    layer = 2.0 * tokens * (attention + 3 * D * config.mlp) + 4.0 * config.heads * A * pairs
    return config.layers * layer + 2.0 * logits * D * config.vocab


def vision_tower(vision: VisionConfig, *, patches: int, pairs: int) -> float:
    """Count the flops of the vision tower with all its mergers. pairs: query-key pairs of attention."""
    E, wide = vision.hidden, vision.hidden * vision.merge**2
    embedding = 2.0 * patches * vision.patch_features * E
    block = 2.0 * patches * (4 * E * E + 2 * E * vision.mlp) + 4.0 * E * pairs
    merger = 2.0 * (patches // vision.merge**2) * (wide * wide + wide * vision.out)
    return embedding + vision.depth * block + (1 + len(vision.deepstack)) * merger


# Passes over episodes.


def forward(config: Qwen3VLConfig, lengths: Sequence[int], images: Sequence[int] = ()) -> float:
    """Count one forward pass over whole episodes with log-probabilities of all tokens.

    lengths: tokens of each episode.
    images: patches of each image of all the episodes.
    """
    return _text(config, lengths) + _vision(config, images)


def update(
    config: Qwen3VLConfig,
    lengths: Sequence[int],
    images: Sequence[int] = (),
    *,
    train_vision: bool = True,
    lora: bool = False,
) -> float:
    """Count the forward and backward pass over whole episodes.

    A frozen vision tower has no backward pass. With low-rank updates (of the decoder) its kernels have no gradient,
    only its activations: twice the forward pass; the small products themselves are left out.
    """
    if lora:
        return 2 * _text(config, lengths) + _vision(config, images)
    return 3 * _text(config, lengths) + (3 if train_vision else 1) * _vision(config, images)


def decode(config: Qwen3VLConfig, lengths: Sequence[int]) -> float:
    """Count one decoding step of slots that hold `lengths` tokens after it."""
    return decoder(config, tokens=len(lengths), pairs=sum(lengths), logits=len(lengths))


def _text(config: Qwen3VLConfig, lengths: Sequence[int]) -> float:
    return decoder(config, tokens=sum(lengths), pairs=causal_pairs(lengths), logits=sum(lengths))


def _vision(config: Qwen3VLConfig, images: Sequence[int]) -> float:
    return vision_tower(config.vision, patches=sum(images), pairs=full_pairs(images))
