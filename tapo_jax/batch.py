"""Define the device arrays that the model and the train step read, as pytrees.

Axes: B rows (one episode each, prompt-major: row = p·G + g), T tokens, N patches of one row's images,
F = channels · temporal · patch².
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """Inputs of one forward pass. The image fields are None in a batch without images."""

    token_BxT: jax.Array
    """int32."""
    segment_BxT: jax.Array
    """int32; 0 is padding. A token attends to itself and to earlier tokens of its own segment."""
    position_BxTx3: jax.Array
    """int32, M-RoPE (time, height, width)."""
    feature_BxT: jax.Array | None = None
    """int32, index into the row's merged image tokens (N // merge²), -1 for text."""
    pixels_BxNxF: jax.Array | None = None
    """float, flattened patches as the image processor makes them, all images of the row one after another."""
    patch_image_BxN: jax.Array | None = None
    """int32; 0 is padding, else 1 + index of the patch's image in the row."""
    patch_rowcol_BxNx2: jax.Array | None = None
    """int32, the patch's row and column in its image (vision rotary embedding)."""
    patch_corner_BxNx4: jax.Array | None = None
    """int32, the four entries of the position table around the patch."""
    patch_weight_BxNx4: jax.Array | None = None
    """float32, their bilinear weights."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """One batch of episodes.

    Every per-token array is aligned with the token itself: logp[t] = log p(token[t] | token[<t]).
    """

    inputs: ModelInputs
    mask_BxT: jax.Array
    """bool, True where the policy wrote the token (never position 0)."""
    step_BxT: jax.Array
    """int32, the tool step k (0..K-1) that the token belongs to, -1 elsewhere."""
    sampler_logp_BxT: jax.Array
    """float32, 0 where the mask is False."""
    old_logp_BxT: jax.Array | None = None
    """float32, the trained model's log-probabilities before the first update on this batch.

    Filled for the rows of the later updates, 0 for those of the first.
    """
    advantage_BxT: jax.Array | None = None
    """float32, after TAPO."""
