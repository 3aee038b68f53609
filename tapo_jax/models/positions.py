"""Compute positions on the host: M-RoPE of tokens; row, column and table entries of patches. numpy only."""

import numpy as np

from tapo_jax.models.config import Qwen3VLConfig, VisionConfig


def rope_positions(
    token_T: np.ndarray, grid_thw_Ix3: np.ndarray, config: Qwen3VLConfig, start: int = 0
) -> tuple[np.ndarray, int]:
    """Return interleaved M-RoPE positions (time, height, width) of consecutive tokens of a conversation.

    A text token has the next number on all three axes. The placeholders of an image that begins at p have
    (p + frame, p + row, p + column) of its merged grid, and the text continues at p + max(rows, columns).

    token_T: ids; the placeholders of the I images are `config.image_token`, as many as their grids say.
    grid_thw_Ix3: patch grids of the images among these tokens.
    config: the model's config.
    start: the position of the first token.

    Returns (position_Tx3 int32, next_position). Passing next_position as the start of the next turn gives the same
    positions as one call for the whole conversation. Raises ValueError if the placeholders and the grids do not match.
    """
    token_T = np.asarray(token_T)
    is_image_T = token_T == config.image_token
    position_Tx3 = np.zeros((len(token_T), 3), np.int32)
    t, grids = 0, iter(np.asarray(grid_thw_Ix3).reshape(-1, 3))
    while t < len(token_T):
        if not is_image_T[t]:
            rest = np.flatnonzero(is_image_T[t:])
            stop = t + int(rest[0]) if len(rest) else len(token_T)
            position_Tx3[t:stop] = np.arange(start, start + stop - t)[:, None]
            start, t = start + stop - t, stop
            continue
        grid = next(grids, None)
        if grid is None:
            raise ValueError(f"the image placeholder at token {t} has no image")
        frames, rows, columns = int(grid[0]), int(grid[1]) // config.vision.merge, int(grid[2]) // config.vision.merge
        stop = t + frames * rows * columns
        if not is_image_T[t:stop].all() or stop > len(token_T):
            raise ValueError(f"the image at token {t} needs {stop - t} placeholders in a row")
        position_Tx3[t:stop] = start + np.indices((frames, rows, columns)).reshape(3, -1).T
        start, t = start + max(rows, columns), stop
    if next(grids, None) is not None:
        raise ValueError("there are more images than image placeholders")
    return position_Tx3, start


def vision_inputs(grid_thw_Ix3: np.ndarray, config: Qwen3VLConfig) -> dict[str, np.ndarray]:
    """Return what the vision tower needs besides pixels, for the patches of I images in the processor's order.

    Patches come block by block (merge × merge patches make one image token), blocks in raster order. Every frame
    attends only to itself. Returns the arrays of `batch.ModelInputs` without its batch axis:
    patch_image_N (1, 2, … by frame), patch_rowcol_Nx2, patch_corner_Nx4 and patch_weight_Nx4 (the learned square table
    resampled to each image's grid, bilinear with aligned corners).
    """
    vision = config.vision
    images, rowcols, corners, weights, frame = [], [], [], [], 0
    for frames, rows, columns in np.asarray(grid_thw_Ix3).reshape(-1, 3).tolist():
        rowcol_Mx2 = _block_order(rows, columns, vision.merge)
        corner_Mx4, weight_Mx4 = _table_entries(rowcol_Mx2, rows, columns, vision)
        for _ in range(frames):
            frame += 1
            images.append(np.full(len(rowcol_Mx2), frame, np.int32))
            rowcols.append(rowcol_Mx2)
            corners.append(corner_Mx4)
            weights.append(weight_Mx4)
    empty = {"image": np.zeros(0, np.int32), "rowcol": np.zeros((0, 2), np.int32)}
    table = {"corner": np.zeros((0, 4), np.int32), "weight": np.zeros((0, 4), np.float32)}
    return {
        "patch_image_N": np.concatenate([empty["image"], *images]),
        "patch_rowcol_Nx2": np.concatenate([empty["rowcol"], *rowcols]),
        "patch_corner_Nx4": np.concatenate([table["corner"], *corners]),
        "patch_weight_Nx4": np.concatenate([table["weight"], *weights]),
    }


def row_inputs(
    token_BxT: np.ndarray,
    pixels_NxF: np.ndarray,
    grid_thw_Ix3: np.ndarray,
    mask_BxT: np.ndarray | None,
    config: Qwen3VLConfig,
) -> dict[str, np.ndarray]:
    """Return the fields of `batch.ModelInputs` for rows of tokens and all their images.

    Each row's patches are padded to the number of the row with most.

    token_BxT: ids.
    pixels_NxF: the patches of all images, in order.
    grid_thw_Ix3: the patch grids of all images, in order.
    mask_BxT: False for padding on either side; None if there is no padding.
    config: the model's config.

    Raises ValueError if placeholders and grids do not match.
    """
    token_BxT, grids = np.asarray(token_BxT, np.int32), np.asarray(grid_thw_Ix3).reshape(-1, 3)
    mask_BxT = np.ones(token_BxT.shape, bool) if mask_BxT is None else np.asarray(mask_BxT, bool)
    B, T = token_BxT.shape
    patches_I = grids.prod(axis=1)
    if patches_I.sum() != len(pixels_NxF):
        raise ValueError(f"the grids tell of {patches_I.sum()} patches, there are {len(pixels_NxF)}")
    is_image_BxT = (token_BxT == config.image_token) & mask_BxT
    ends_I = np.cumsum(patches_I // config.vision.merge**2)
    cuts = np.searchsorted(ends_I, np.cumsum(is_image_BxT.sum(axis=1)), side="right")
    rows = [grids[start:stop] for start, stop in zip([0, *cuts[:-1]], cuts, strict=True)]
    if cuts[-1] != len(grids):
        raise ValueError("there are more images than image placeholders")
    N = max(max(int(row.prod(axis=1).sum()) for row in rows), config.vision.merge**2)
    fields = {
        "token_BxT": token_BxT,
        "segment_BxT": mask_BxT.astype(np.int32),
        "position_BxTx3": np.zeros((B, T, 3), np.int32),
        "feature_BxT": np.where(is_image_BxT, np.cumsum(is_image_BxT, axis=1) - 1, -1).astype(np.int32),
        "pixels_BxNxF": np.zeros((B, N, config.vision.patch_features), np.float32),
        "patch_image_BxN": np.zeros((B, N), np.int32),
        "patch_rowcol_BxNx2": np.zeros((B, N, 2), np.int32),
        "patch_corner_BxNx4": np.zeros((B, N, 4), np.int32),
        "patch_weight_BxNx4": np.zeros((B, N, 4), np.float32),
    }
    start = 0
    for b, row in enumerate(rows):
        n = int(row.prod(axis=1).sum())
        fields["position_BxTx3"][b, mask_BxT[b]] = rope_positions(token_BxT[b, mask_BxT[b]], row, config)[0]
        fields["pixels_BxNxF"][b, :n] = pixels_NxF[start : start + n]
        for name, value in vision_inputs(row, config).items():
            fields[name.replace("_N", "_BxN")][b, :n] = value
        start += n
    return fields


def _block_order(rows: int, columns: int, merge: int) -> np.ndarray:
    """Return (row, column) of every patch of a frame, in merge-block order, int32 [rows · columns, 2]."""
    raster = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    return raster.transpose(1, 3, 2, 4, 0).reshape(-1, 2).astype(np.int32)


def _table_entries(
    rowcol_Mx2: np.ndarray, rows: int, columns: int, vision: VisionConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the four table entries around every patch and their weights; corners of grid and table coincide."""
    side = vision.position_side
    low, high, far = [], [], []
    for axis, size in enumerate((rows, columns)):
        # float32 throughout, the multiplication first: rounding decides which cell a patch is in, and the published
        # model rounds this way.
        place = rowcol_Mx2[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        floor = np.floor(place)
        low.append(floor.astype(np.int32))
        high.append(np.minimum(floor.astype(np.int32) + 1, side - 1))
        far.append((place - floor).astype(np.float32))
    near = [1 - far[0], 1 - far[1]]
    corner = [low[0] * side + low[1], low[0] * side + high[1], high[0] * side + low[1], high[0] * side + high[1]]
    weight = [near[0] * near[1], near[0] * far[1], far[0] * near[1], far[0] * far[1]]
    return np.stack(corner, -1).astype(np.int32), np.stack(weight, -1).astype(np.float32)
