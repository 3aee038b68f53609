"""The plain use of the sampler: prompts in, tokens out."""

import functools
from collections.abc import Sequence

import numpy as np
from flax import nnx

from tapo_jax import sharding
from tapo_jax.models import qwen3_vl
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore, Row, make_row
from tapo_jax.rollout.sampler import Sampler
from tapo_jax.rollout.schedule import Draw, Extension, Needs, Sampling, Shapes
from tapo_jax.types import root_image


def generate(
    model: qwen3_vl.Qwen3VL,
    config: Qwen3VLConfig,
    prompts: Sequence[Sequence[int]],
    *,
    images: Sequence[Sequence[np.ndarray]] | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Return the `max_new_tokens` ids that follow each prompt.

    Vision tokens are never drawn. For stop tokens, an image processor of your own or another number of slots, call
    `prompt_rows` and `continue_rows`, of which this is the composition.

    Args:
        model: the parameters.
        config: the model's.
        prompts: lists of ids; in them each image is one placeholder, or as many as it has tokens.
        images: for each prompt its images (uint8 [H, W, 3]).
        max_new_tokens: ids to draw for each prompt.
        temperature: 0 is greedy.
        top_p: the share of probability that tokens are drawn from.
        seed: of the random draws.

    Raises ValueError where placeholders and images do not match, or a prompt is empty.
    """
    rows = prompt_rows(prompts, images, config)
    return continue_rows(model, rows, Sampling(temperature, top_p, seed), max_new_tokens=max_new_tokens)


def prompt_rows(
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[np.ndarray]] | None,
    config: Qwen3VLConfig,
    processor: ImageProcessor | None = None,
) -> list[tuple[Row, int]]:
    """Return for each prompt its row of model inputs and the position of the token that follows it.

    Args:
        prompts: lists of ids; in them each image is one placeholder, or as many as it has tokens.
        images: for each prompt its images (uint8 [H, W, 3]); None: there are none.
        config: the model's.
        processor: resizes the images; None has the published bounds.

    Raises ValueError where placeholders and images do not match, or a prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: there is nothing to continue")
    return [_prompt_row(ids, images[i] if images else (), config, processor) for i, ids in enumerate(prompts)]


def continue_rows(
    model: qwen3_vl.Qwen3VL,
    rows: Sequence[tuple[Row, int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    slots: int = 32,
) -> list[list[int]]:
    """Return the ids that follow each row. Vision tokens are never drawn.

    Args:
        model: the parameters and their config.
        rows: from `prompt_rows`.
        sampling: temperature, top_p and seed.
        max_new_tokens: the most ids to draw for each row.
        stop_ids: each of them ends a row and is its last id.
        slots: rows that are decoded together.
    """
    if not rows or max_new_tokens < 1:
        return [[] for _ in rows]
    config = model.config
    forbidden_V = np.zeros(config.vocab, bool)
    forbidden_V[[config.image_token, config.video_token, config.vision_start, config.vision_end]] = True
    shapes = _shapes(rows, slots, max_new_tokens, config.vision.merge)
    sampler = Sampler(model, sharding.one_device(), shapes, stop_ids=stop_ids, forbidden_V=forbidden_V)
    weights = sampler.reshard(nnx.to_pure_dict(nnx.state(model)))
    written: list[list[int]] = [[] for _ in rows]
    for first in range(0, len(rows), sampler.slots):
        batch = rows[first : first + sampler.slots]
        extensions = [Extension(slot, 0, row, fresh=True) for slot, (row, _) in enumerate(batch)]
        going = list(range(len(batch)))
        while going:
            draws = [
                _next_draw(slot, first, *batch[slot], len(written[first + slot]), max_new_tokens) for slot in going
            ]
            plan = sampler.plan(Needs(extensions, (), draws), more=True)
            sampler.extend(weights, plan, extensions)
            extensions = []
            for slot, (token_n, _) in zip(going, sampler.decode(weights, plan, draws, sampling).fetch(), strict=True):
                written[first + slot].extend(token_n.tolist())
            open_turns = (written[first + slot] for slot in going)
            going = [
                slot
                for slot, ids in zip(going, open_turns, strict=True)
                if len(ids) < max_new_tokens and ids[-1] not in sampler.stop_ids
            ]
    return written


def _shapes(rows: Sequence[tuple[Row, int]], slots: int, max_new_tokens: int, merge: int) -> Shapes:
    """Return the one shape of each call that every batch of these rows fits in; lengths are multiples of 64."""
    length = -(-max(len(row.token_T) for row, _ in rows) // 64) * 64
    patches = max(row.patches for row, _ in rows)
    return Shapes(
        extend_rows=(min(slots, len(rows)),),
        decode_rows=(min(slots, len(rows)),),
        lengths=(length,),
        patches=(patches,) if patches else (),
        windows=(length + -(-max_new_tokens // 64) * 64,),
        chunk=64,
        merge=merge,
    )


def _next_draw(slot: int, first: int, row: Row, position: int, written: int, max_new_tokens: int) -> Draw:
    """Return the draw that resumes prompt number first + slot at `position`, after `written` tokens."""
    return Draw(
        slot=slot,
        length=len(row.token_T) + written,
        position=position + written,
        allowance=max_new_tokens - written,
        drawn=written,
        prompt=first + slot,
        sample=0,
        turn=0,
    )


def _prompt_row(
    ids: Sequence[int], images: Sequence[np.ndarray], config: Qwen3VLConfig, processor: ImageProcessor | None
) -> tuple[Row, int]:
    """Expand each placeholder to its image's tokens; return the row and the position of the token that follows it."""
    vision = config.vision
    sized = functools.partial(ImageProcessor, patch=vision.patch, merge=vision.merge, temporal=vision.temporal)
    # Placeholders that were expanded by a processor with other bounds tell that they were: then images keep their size.
    unbounded = sized(min_pixels=1, max_pixels=1 << 40)
    candidates = [processor] if processor else [sized(), unbounded]
    places = sum(token == config.image_token for token in ids)
    counts = [[p.tokens(p.grid(*image.shape[:2])) for image in images] for p in candidates]
    for candidate, count in zip(candidates, counts, strict=True):
        if places in (len(images), sum(count)):
            rest = iter([1] * places if places == sum(count) else count)
            expanded = [copy for token in ids for copy in [token] * (next(rest) if token == config.image_token else 1)]
            return make_row(
                np.array(expanded, np.int32), [root_image(image) for image in images], config, PixelStore(candidate)
            )
    raise ValueError(f"{places} image placeholders for images of {counts[0]} tokens")
