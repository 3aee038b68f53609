"""Compare all pairs of tool steps of a group, on the device. Axes as in `encode`; axis O is a second S, W words.

[same tool] · [equal identities] · mean over the other parameters, and each kind of parameter has its own measure:

    region  [same root image] · IoU          number  max(0, 1 - |a - b| / range)
    text    dice 2·Σmin / (Σa + Σb), jaccard Σmin / Σmax, cosine (floored at 0), exact

A parameter that only one of two calls has counts as similarity 0, one that neither has does not count.
"""

import jax
import jax.numpy as jnp

from tapo_jax.tapo.encode import MAX_COUNT, Array, Steps

TEXT_MEASURES = ("dice", "jaccard", "cosine", "exact")
Levels = tuple[jax.Array, tuple[jax.Array, ...], jax.Array]  # level, the bits of each word at it, the sum below it


def pairwise_similarity(steps: Steps, text: str = "dice") -> jax.Array:
    """Return sim_PxSxS in 0..1: float32, symmetric; exactly 1 for equal calls, 0 where either slot has no valid step.

    text: "dice", "jaccard" (of uint8 counts), "cosine" (of counts or embeddings), "exact" (equal after normalising).
    Raises ValueError for another measure and for dice or jaccard of another type.
    """
    if text not in TEXT_MEASURES:
        raise ValueError(f"text similarity is {text!r}; known: {', '.join(TEXT_MEASURES)}")
    same_PxSxS = _equal(steps.tool_PxS) & _equal(steps.identity_PxS) & _both(steps.valid_PxS)
    total_PxSxS = jnp.zeros(same_PxSxS.shape, jnp.float32)
    count_PxSxS = jnp.zeros(same_PxSxS.shape, jnp.int32)
    compared = [
        *(_region(steps, i) for i in range(steps.root_PxSxR.shape[2])),
        *(_text(steps, i, text) for i in range(steps.text_PxSxXxF.shape[2])),
        *(_number(steps, i) for i in range(steps.number_PxSxN.shape[2])),
    ]
    for sim_PxSxS, present_PxS in compared:
        total_PxSxS += jnp.where(_both(present_PxS), sim_PxSxS, 0)
        count_PxSxS += present_PxS[:, :, None] | present_PxS[:, None, :]
    mean_PxSxS = jnp.where(count_PxSxS > 0, total_PxSxS / jnp.maximum(count_PxSxS, 1), 1)
    return jnp.where(same_PxSxS, jnp.minimum(mean_PxSxS, 1), 0)


def _equal(value_PxS: Array) -> Array:
    return value_PxS[:, :, None] == value_PxS[:, None, :]


def _both(flag_PxS: Array) -> Array:
    return flag_PxS[:, :, None] & flag_PxS[:, None, :]


def _region(steps: Steps, i: int) -> tuple[jax.Array, Array]:
    """Return (similarity of the i-th regions of all pairs, whether each step has one)."""
    box_PxSx4 = steps.box_PxSxRx4[:, :, i]
    x1, y1, x2, y2 = jax.lax.optimization_barrier(tuple(box_PxSx4[..., c] for c in range(4)))
    area_PxS = jnp.maximum(x2 - x1, 0) * jnp.maximum(y2 - y1, 0)
    width_PxSxS = jnp.minimum(x2[:, :, None], x2[:, None, :]) - jnp.maximum(x1[:, :, None], x1[:, None, :])
    height_PxSxS = jnp.minimum(y2[:, :, None], y2[:, None, :]) - jnp.maximum(y1[:, :, None], y1[:, None, :])
    shared_PxSxS = jnp.maximum(width_PxSxS, 0) * jnp.maximum(height_PxSxS, 0)
    union_PxSxS = area_PxS[:, :, None] + area_PxS[:, None, :] - shared_PxSxS
    iou_PxSxS = jnp.where(union_PxSxS > 0, shared_PxSxS / jnp.where(union_PxSxS > 0, union_PxSxS, 1), 0)
    # Equal boxes give 1 by comparison: a fused multiply-add may round the union one unit away from the intersection.
    equal_PxSxS = _equal(x1) & _equal(y1) & _equal(x2) & _equal(y2)
    sim_PxSxS = jnp.where(equal_PxSxS, 1, iou_PxSxS) * _equal(steps.root_PxSxR[:, :, i])
    return sim_PxSxS, steps.has_region_PxSxR[:, :, i]


def _number(steps: Steps, i: int) -> tuple[jax.Array, Array]:
    """Return (similarity of the i-th numbers of all pairs, whether each step has one)."""
    number_PxS = steps.number_PxSxN[:, :, i]
    distance_PxSxS = jnp.abs(number_PxS[:, :, None] - number_PxS[:, None, :])
    return jnp.maximum(1 - distance_PxSxS, 0), steps.has_number_PxSxN[:, :, i]


def _text(steps: Steps, i: int, measure: str) -> tuple[Array, Array]:
    """Return (similarity of the i-th texts of all pairs, whether each step has one)."""
    text_PxSxF = steps.text_PxSxXxF[:, :, i]
    P, S = text_PxSxF.shape[:2]
    equal_PxSxS = _equal(steps.text_hash_PxSxX[:, :, i])
    if measure == "exact":
        return equal_PxSxS.astype(jnp.float32), steps.has_text_PxSxX[:, :, i]
    if measure == "cosine":
        sim_PxSxS = _cosine(text_PxSxF)
    else:
        if text_PxSxF.dtype != jnp.uint8:
            raise ValueError(f"{measure} compares uint8 counts, the features are {text_PxSxF.dtype}: use text='cosine'")
        shared_PxSxS = shared_counts(text_PxSxF)
        size_PxS = shared_PxSxS.reshape(P, S * S)[:, :: S + 1]  # the diagonal: Σ min(a, a) = Σ a
        total_PxSxS = size_PxS[:, :, None] + size_PxS[:, None, :]
        if measure == "dice":
            shared_PxSxS = 2 * shared_PxSxS
        else:
            total_PxSxS = total_PxSxS - shared_PxSxS
        sim_PxSxS = shared_PxSxS.astype(jnp.float32) / jnp.maximum(total_PxSxS, 1).astype(jnp.float32)
    return jnp.where(equal_PxSxS, 1, sim_PxSxS), steps.has_text_PxSxX[:, :, i]


def _cosine(text_PxSxF: Array) -> jax.Array:
    text_PxSxF = text_PxSxF.astype(jnp.float32)
    # HIGHEST: a TPU's default product rounds its inputs to bfloat16, which is coarser than the thresholds deserve.
    dot_PxSxS = jnp.einsum("psf,pof->pso", text_PxSxF, text_PxSxF, precision=jax.lax.Precision.HIGHEST)
    norm_PxS = jnp.sqrt((text_PxSxF**2).sum(axis=-1))
    scale_PxSxS = norm_PxS[:, :, None] * norm_PxS[:, None, :]
    return jnp.clip(dot_PxSxS / jnp.where(scale_PxSxS > 0, scale_PxSxS, 1), 0, 1)


def shared_counts(count_PxSxF: Array) -> jax.Array:
    """Return Σ_f min(a_f, b_f) of all pairs, int32 [P, S, S], exact. count_PxSxF: uint8.

    min(a, b) = Σ_{t ≥ 1} [a ≥ t]·[b ≥ t], so each level t is an AND of bit rows and a population count: 32 features an
    instruction, and no [P, S, S, F] array. Levels run as long as any count reaches them (a handful in search queries).
    """
    P, S, F = count_PxSxF.shape
    words = -(-F // 32)
    count_PxSxF = jnp.pad(count_PxSxF, ((0, 0), (0, 0), (0, 32 * words - F)))
    # Four counts in each uint32, eight of those for each word of bits; which feature lands where does not matter.
    four_PxSx8xW = jax.lax.bitcast_convert_type(count_PxSxF.reshape(P, S, 8, words, 4), jnp.uint32)
    shift_1x1x8x1 = jnp.arange(8, dtype=jnp.uint32).reshape(1, 1, 8, 1)

    def bits(level: jax.Array) -> tuple[jax.Array, ...]:
        """Return a uint32 [P, S] for each word: in one array XLA interleaves the words and reads pairs in strides."""
        reached_PxSx8xW = _bytes_at_least(four_PxSx8xW, level.astype(jnp.uint32)) >> 7
        bits_PxSxW = (reached_PxSx8xW << shift_1x1x8x1).sum(axis=2, dtype=jnp.uint32)
        return tuple(bits_PxSxW[:, :, w] for w in range(words))

    def add_level(carry: Levels) -> Levels:
        level, bits_of_words, shared_PxSxS = carry
        for bits_PxS in bits_of_words:
            both_PxSxS = bits_PxS[:, :, None] & bits_PxS[:, None, :]
            shared_PxSxS += jax.lax.population_count(both_PxSxS).astype(jnp.int32)
        # The next level's bits travel in the carry: computed where they are used, they are computed for every pair.
        return level + 1, bits(level + 1), shared_PxSxS

    def any_left(carry: Levels) -> jax.Array:
        level, bits_of_words, _ = carry
        return (level <= MAX_COUNT) & jnp.stack([bits_PxS.max(initial=0) for bits_PxS in bits_of_words]).any()

    start = (jnp.int32(1), bits(jnp.int32(1)), jnp.zeros((P, S, S), jnp.int32))
    return jax.lax.while_loop(any_left, add_level, start)[2]


def _bytes_at_least(four: jax.Array, level: jax.Array) -> jax.Array:
    """Set the top bit of each byte of `four` where that byte is ≥ level (1..255); clear all other bits.

    With its top bit set, a byte minus the level's low seven bits cannot borrow from its neighbour, and keeps the bit
    exactly where its own low seven bits are not smaller.
    """
    tops = jnp.uint32(0x80808080)
    low = ((four | tops) - (level & 127) * jnp.uint32(0x01010101)) & tops
    return jnp.where(level < 128, (four & tops) | low, (four & tops) & low)
