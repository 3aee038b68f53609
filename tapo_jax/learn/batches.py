"""Pack episodes into the arrays that the train step reads."""

from collections.abc import Sequence

import numpy as np

from tapo_jax.batch import TrainBatch
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.inputs import PixelStore, Row, make_row, model_inputs
from tapo_jax.types import Episode, Turn


def tool_steps(episode: Episode, steps: int) -> list[Turn]:
    """Return the executed calls of an episode in order, at most `steps`: TAPO's slot k is the k-th of this list."""
    return [turn for turn in episode.turns if turn.is_step][:steps]


def pack(
    episodes: Sequence[Episode],
    config: Qwen3VLConfig,
    pixels: PixelStore,
    *,
    length: int,
    patches: int,
    steps: int,
) -> TrainBatch:
    """Pack B episodes into a TrainBatch of numpy arrays, without old_logp and advantage.

    episodes: row b is episodes[b].
    config: the model's config.
    pixels: where the images' patches come from.
    length: tokens of a row, padding included.
    patches: patches of a row, padding included; 0 leaves the image fields out.
    steps: max tool steps of a rollout.

    Raises ValueError if a row does not fit, or if an episode's ids, mask and log-probabilities do not line up.
    """
    B = len(episodes)
    mask_BxT = np.zeros((B, length), bool)
    step_BxT = np.full((B, length), -1, np.int32)
    logp_BxT = np.zeros((B, length), np.float32)
    rows: list[Row | None] = []
    for episode in episodes:
        check_episode(episode, config)
        empty = len(episode.token_T) == 0
        rows.append(None if empty else make_row(episode.token_T, episode.images, config, pixels)[0])
    inputs = model_inputs(rows, length=length, patches=patches, config=config, dtype=pixels.dtype)
    for b, episode in enumerate(episodes):
        count = len(episode.token_T)
        mask_BxT[b, :count] = episode.mask_T
        logp_BxT[b, :count] = episode.sampler_logp_T
        for k, turn in enumerate(tool_steps(episode, steps)):
            step_BxT[b, turn.start : turn.stop] = k
    return TrainBatch(inputs=inputs, mask_BxT=mask_BxT, step_BxT=step_BxT, sampler_logp_BxT=logp_BxT)


def check_episode(episode: Episode, config: Qwen3VLConfig) -> None:
    """Raise ValueError unless ids, mask, log-probabilities, turns and images of an episode line up."""
    count = len(episode.token_T)
    written_T = np.zeros(count, bool)
    for turn in episode.turns:
        written_T[turn.start : turn.stop] = True
        if turn.forced is not None:
            written_T[slice(*turn.forced)] = False
    starts = np.array(episode.image_start, np.int64)
    problems = {
        "mask_T or sampler_logp_T has another length than token_T": not count
        == len(episode.mask_T)
        == len(episode.sampler_logp_T),
        "the first token is in the loss": bool(count and written_T[0]),
        "mask_T is not the union of the turns": not np.array_equal(written_T, episode.mask_T),
        "a log-probability outside of the mask": bool(np.any(episode.sampler_logp_T[~written_T])),
        "a log-probability above 0": bool(np.any(episode.sampler_logp_T > 0)),
        "image_start has another length than images": len(starts) != len(episode.images),
        "image_start is no placeholder": bool(np.any(episode.token_T[starts] != config.image_token)),
        "the policy wrote a placeholder": bool(np.any(episode.token_T[written_T] == config.image_token)),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"episode {episode.prompt.id!r} sample {episode.sample}: {problem}")
