"""Arrays that go to the device, as pytrees: what the model reads and what the train step reads.

Axes: B rows (one episode each, prompt-major: row = p·G + g), T tokens, N patches of one row's images,
F = channels · temporal · patch².
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """Inputs of one forward. The image fields are None in a batch without images.

    token_BxT: int32.
    segment_BxT: int32; 0 is padding; a token attends to earlier tokens of its own segment.
    position_BxTx3: int32, M-RoPE (time, height, width).
    feature_BxT: int32, index into the row's merged image tokens (N // merge²), -1 where the token is text.
    pixels_BxNxF: float, flattened patches as the image processor gives them, all images of the row one after another.
    patch_image_BxN: int32, 0 padding, else 1 + the number of the patch's image in the row.
    patch_rowcol_BxNx2: int32, the patch's row and column in its image (vision rotary embedding).
    patch_corner_BxNx4, patch_weight_BxNx4: int32, float32: the four entries of the position table and their
        bilinear weights.
    """

    token_BxT: jax.Array
    segment_BxT: jax.Array
    position_BxTx3: jax.Array
    feature_BxT: jax.Array | None = None
    pixels_BxNxF: jax.Array | None = None
    patch_image_BxN: jax.Array | None = None
    patch_rowcol_BxNx2: jax.Array | None = None
    patch_corner_BxNx4: jax.Array | None = None
    patch_weight_BxNx4: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """One batch of episodes. Every per-token array is aligned with the token itself:
    logp[t] = log p(token[t] | token[<t]).

    inputs: ModelInputs.
    mask_BxT: bool, True where the policy wrote the token (never position 0).
    step_BxT: int32, the tool step k (0..K-1) that the token belongs to, -1 elsewhere.
    sampler_logp_BxT: float32, 0 where mask is False.
    old_logp_BxT: float32, the training model's own log-probabilities before the first update on this batch,
        for the rows of the later ones; 0 for the rows of the first.
    advantage_BxT: float32, after TAPO.
    """

    inputs: ModelInputs
    mask_BxT: jax.Array
    step_BxT: jax.Array
    sampler_logp_BxT: jax.Array
    old_logp_BxT: jax.Array | None = None
    advantage_BxT: jax.Array | None = None
