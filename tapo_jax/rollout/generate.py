"""The plain use of the sampler: prompts in, tokens out."""

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
    stop_ids: Sequence[int] = (),
    processor: ImageProcessor | None = None,
    slots: int = 32,
) -> list[list[int]]:
    """The ids that follow each prompt: `max_new_tokens` of them, or fewer where one of `stop_ids` ends them (it is the
    last).

    prompts: lists of ids. images: for each prompt its images (uint8 [H, W, 3]); in its ids each image is one
    placeholder, or as many as it has tokens. temperature 0 is greedy. Vision tokens are never drawn. processor: None
    has the published bounds. slots: prompts that are decoded together.
    Raises ValueError where placeholders and images do not match, or a prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: there is nothing to continue")
    rows = [_prompt_row(ids, images[i] if images else (), config, processor) for i, ids in enumerate(prompts)]
    if not rows or max_new_tokens < 1:
        return [[] for _ in rows]
    length = -(-max(len(row.token_T) for row, _ in rows) // 64) * 64
    patches = max(row.patches for row, _ in rows)
    shapes = Shapes(
        extend_rows=(min(slots, len(rows)),),
        decode_rows=(min(slots, len(rows)),),
        lengths=(length,),
        patches=(patches,) if patches else (),
        windows=(length + -(-max_new_tokens // 64) * 64,),
        chunk=64,
        merge=config.vision.merge,
    )
    forbidden_V = np.zeros(config.vocab, bool)
    forbidden_V[[config.image_token, config.video_token, config.vision_start, config.vision_end]] = True
    sampler = Sampler(model, sharding.one_device(), shapes, stop_ids=stop_ids, forbidden_V=forbidden_V)
    params = nnx.to_pure_dict(nnx.state(model))
    sampling = Sampling(temperature, top_p, seed)
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
            sampler.extend(params, plan, extensions)
            extensions = []
            for slot, (token_n, _) in zip(going, sampler.decode(params, plan, draws, sampling).fetch(), strict=True):
                written[first + slot].extend(token_n.tolist())
            open_turns = (written[first + slot] for slot in going)
            going = [
                slot
                for slot, ids in zip(going, open_turns, strict=True)
                if len(ids) < max_new_tokens and ids[-1] not in sampler.stop_ids
            ]
    return written


def _next_draw(slot: int, first: int, row: Row, position: int, written: int, max_new_tokens: int) -> Draw:
    """The draw of prompt number first + slot, which goes on at `position` and has `written` tokens already."""
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
    vision = config.vision
    sizes = {"patch": vision.patch, "merge": vision.merge, "temporal": vision.temporal}
    # Placeholders that were expanded by a processor with other bounds tell that they were: then images keep their size.
    unbounded = ImageProcessor(**sizes, min_pixels=1, max_pixels=1 << 40)
    candidates = [processor] if processor else [ImageProcessor(**sizes), unbounded]
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
