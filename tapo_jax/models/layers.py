"""Operations that the decoder and the vision tower share: products with kernels, norms, rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # a score that softmax turns into 0; finite, so that a row with no other score has no NaN


def product(x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
    """Return x · kernel over the last `axes` axes of x and the first of the kernel, in the dtype of x.

    Written as a product of two matrices: with more axes the gradient of the kernel costs transposed copies on a CPU.
    """
    rows, outputs = x.shape[: x.ndim - axes], kernel.shape[axes:]
    inputs = math.prod(kernel.shape[:axes])
    y = x.reshape(math.prod(rows), inputs) @ kernel.astype(x.dtype).reshape(inputs, math.prod(outputs))
    return y.reshape(*rows, *outputs)


def project(x: jax.Array, p: dict, name: str, axes: int = 1) -> jax.Array:
    """Apply the linear map p[name], with its bias and its low-rank update if p has them."""
    y = product(x, p[name], axes)
    if f"{name}_lora_a" in p:
        y = y + product(product(x, p[f"{name}_lora_a"], axes), p[f"{name}_lora_b"])
    return y + along(p[f"{name}_bias"], y) if f"{name}_bias" in p else y


def along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Return `vector` in the dtype of x, with leading axes so that it broadcasts along the last axes of x."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Return x / rms(x), computed in float32, times scale in the dtype of x."""
    x32 = x.astype(jnp.float32)
    normal = (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
    return normal * along(scale, normal)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return (normal * along(scale, normal) + along(bias, normal)).astype(x.dtype)


def rotate(x_BxTxHxA: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the P = A/2 pairs (a, a + A/2) of every head, in float32. angles: their cos and sin, [B, T, 1, P]."""
    cos, sin = angles
    low, high = jnp.split(x_BxTxHxA.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BxTxHxA.dtype)


def frequencies(pairs: int, theta: float) -> np.ndarray:
    """Return theta^(-p / pairs) of each pair p.

    Each operation rounds to float32 as in PyTorch; at far positions any other rounding shows."""
    power_P = np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(2 * pairs)
    return np.float32(1) / np.float32(theta) ** power_P
