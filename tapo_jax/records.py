"""Read and write recorded episodes, for the viewer and the credit report. One .npz file per step, no pickle.

A file has one JSON text (`episodes`, uint8) and every distinct image once as PNG bytes (`image_00000`, uint8).
This module imports no jax.
"""

import dataclasses
import hashlib
import io
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from tapo_jax.config import UserError
from tapo_jax.types import Episode

MOST_PIXELS = 1 << 20  # max pixels of a recorded image


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file atomically: to a temporary name next to it, then rename. Creates the folder; text is UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode("utf-8", "replace") if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, *, way: str, needs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a JSON file that contains an object with the names in `needs`.

    Raises UserError if it contains anything else.

    way: the end of the error's sentence, which says what the user can do.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {way}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds {found!r:.40}, and names with values are needed): {way}.")
    if missing := [name for name in needs if name not in found]:
        raise UserError(f"{path} is damaged (it has no {', '.join(missing)}): {way}.")
    return found


@dataclasses.dataclass(frozen=True)
class RecordedTurn:
    """One assistant turn."""

    text: str
    """Written by the policy: never trust it as markup."""
    call_name: str | None = None
    call_arguments: dict[str, Any] | None = None
    result: str | None = None
    error: str | None = None
    source: str = ""
    """Where the result of a service came from: live, cache, joined or replay; "" if no service was asked."""
    result_images: tuple[int, ...] = ()
    """Indices into the episode's images."""
    slot: int = -1
    """Tool step k of the turn, -1 if it is not a valid step."""
    adv_before: float = 0.0
    """Advantage of the turn's tokens before TAPO."""
    adv_after: float = 0.0
    """Advantage of the turn's tokens after TAPO."""
    correctable: bool = False
    corrected: bool = False
    sim: float = 0.0
    """Similarity to the best cluster."""
    support: float = 0.0
    """Support of the best cluster."""
    witness: tuple[int, int, int] | None = None
    """(prompt, sample, slot) of the step that the turn borrowed credit from, None if there was none."""
    continues: bool = False
    """Whether it is a further call of the same message as the turn before."""


@dataclasses.dataclass(frozen=True)
class RecordedEpisode:
    """One conversation."""

    step: int
    prompt: int
    sample: int
    prompt_id: str
    question: str
    answers: tuple[str, ...]
    hops: int
    images: tuple[bytes, ...]
    """PNG bytes in the order of `img_idx`; the first `prompt_images` belong to the question."""
    prompt_images: int
    turns: tuple[RecordedTurn, ...]
    answer: str | None
    finish: str
    rewards: dict[str, float]
    reward: float
    success: bool
    advantage: float
    judged: bool = True
    """False if there was no verdict on the answer; it does not count as a wrong answer then."""


def png(pixels_HxWx3: np.ndarray) -> bytes:
    """Encode an image as PNG, reduced to about a megapixel if it is larger, because a page shows no more."""
    buffer, image = io.BytesIO(), PillowImage.fromarray(pixels_HxWx3)
    shrink = (image.width * image.height / MOST_PIXELS) ** 0.5
    if shrink > 1:
        image.thumbnail((round(image.width / shrink), round(image.height / shrink)))
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def credit_fields(
    transfer: Any, prompt: int, sample: int, *, steps: int, rollouts: int, pooled: bool
) -> list[dict[str, Any]]:
    """Return the fields that `record` needs for each tool step of one episode.

    transfer: a `tapo.CreditTransfer` of numpy arrays.
    prompt, sample: indices of the episode.
    steps: K, slots of a rollout.
    rollouts: number of rollouts of a group, including remembered ones of earlier steps. A remembered witness is left
        out, because its sample index would be outside of the group.
    pooled: whether witnesses are numbered over the whole batch (TAPO's scope "batch").
    """
    fields = []
    samples = transfer.witness_PxS.shape[1] // steps
    for k in range(steps):
        at = (prompt, sample * steps + k)
        number = int(transfer.witness_PxS[at])
        group, slot = divmod(number, rollouts * steps) if pooled else (prompt, number)
        known = number >= 0 and slot < samples * steps
        fields.append(
            {
                "adv_after": float(transfer.advantage_PxS[at]),
                "correctable": bool(transfer.correctable_PxS[at]),
                "corrected": bool(transfer.corrected_PxS[at]),
                "sim": float(transfer.sim_PxS[at]),
                "support": float(transfer.support_PxS[at]),
                "witness": (group, *divmod(slot, steps)) if known else None,
            }
        )
    return fields


def record(
    episode: Episode, *, step: int, prompt: int, advantage: float, credit: Sequence[dict[str, Any]]
) -> RecordedEpisode:
    """Return the recorded form of an episode.

    credit[k]: the fields adv_after, correctable, corrected, sim, support and witness of tool step k.
    """
    turns, slot, result_image = [], 0, len(episode.prompt.images)
    for turn in episode.turns:
        shown = () if turn.result is None else tuple(range(result_image, result_image + len(turn.result.images)))
        result_image += len(shown)
        fields: dict[str, Any] = {"adv_after": advantage}
        if turn.is_step and slot < len(credit):
            fields = {"slot": slot, **credit[slot]}
            slot += 1
        turns.append(
            RecordedTurn(
                text=turn.text,
                call_name=turn.call.name if turn.call else None,
                call_arguments=turn.call.arguments if turn.call else None,
                result=turn.result.text if turn.result else None,
                error=turn.result.error if turn.result else None,
                source=turn.result.origin.source if turn.result and turn.result.origin else "",
                result_images=tuple(index for index in shown if index < len(episode.images)),
                adv_before=advantage,
                continues=turn.continues,
                **fields,
            )
        )
    return RecordedEpisode(
        step=step,
        prompt=prompt,
        sample=episode.sample,
        prompt_id=episode.prompt.id,
        question=episode.prompt.question,
        answers=episode.prompt.answers,
        hops=episode.prompt.hops,
        images=tuple(png(image.pixels) for image in episode.images),
        prompt_images=len(episode.prompt.images),
        turns=tuple(turns),
        answer=episode.answer,
        finish=episode.finish,
        rewards=episode.rewards,
        reward=episode.reward,
        success=episode.success,
        advantage=advantage,
        judged=episode.judged,
    )


def save(path: Path, episodes: Sequence[RecordedEpisode]) -> None:
    """Write the episodes of one step, atomically (a temporary file is renamed)."""
    arrays: dict[str, np.ndarray] = {}
    name_of: dict[bytes, str] = {}
    items = []
    for episode in episodes:
        names = []
        for image in episode.images:
            key = hashlib.sha256(image).digest()
            if key not in name_of:
                name_of[key] = f"image_{len(name_of):05d}"
                arrays[name_of[key]] = np.frombuffer(image, np.uint8)
            names.append(name_of[key])
        items.append(dataclasses.asdict(dataclasses.replace(episode, images=())) | {"images": names})
    arrays["episodes"] = np.frombuffer(json.dumps(items).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


# Errors that reading the archive, the JSON or the dataclasses raises for a file that is cut, empty or not a recording.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)


def load(path: Path) -> list[RecordedEpisode]:
    """Read the episodes of one step. Raises UserError, which names the file, if it is not a recording."""
    try:
        return _load(path)
    except _DAMAGE as error:
        raise UserError(
            f"The recording {path} cannot be read ({type(error).__name__}: {error}): remove the damaged file."
        ) from error


def _load(path: Path) -> list[RecordedEpisode]:
    with np.load(path, allow_pickle=False) as arrays:
        items = json.loads(arrays["episodes"].tobytes())
        images = {name: arrays[name].tobytes() for name in arrays.files if name.startswith("image_")}
    episodes = []
    for item in items:
        turns = tuple(
            RecordedTurn(
                **turn
                | {
                    "result_images": tuple(turn["result_images"]),
                    "witness": None if turn["witness"] is None else tuple(turn["witness"]),
                }
            )
            for turn in item["turns"]
        )
        fixed = {
            "images": tuple(images[name] for name in item["images"]),
            "answers": tuple(item["answers"]),
            "turns": turns,
        }
        episodes.append(RecordedEpisode(**item | fixed))
    return episodes


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl. A damaged line is left out and named on stderr."""
    lines, damaged = parse_metrics(path.read_bytes() if path.exists() else b"")
    for number, reason in damaged:
        print(f"{path}, line {number} is left out: {reason}", file=sys.stderr)
    return lines


def parse_metrics(data: bytes) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Parse a metrics.jsonl. Returns its lines, and the line number and fault of each damaged one.

    A last line without a newline was cut short by a kill; it is left out, but does not count as damage.
    """
    lines, damaged = [], []
    *whole, cut = data.split(b"\n")
    for number, text in enumerate([*whole, cut], start=1):
        try:
            lines.append(_metrics(text.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            if text.strip() and number <= len(whole):
                damaged.append((number, str(error)))
    return lines, damaged


def _metrics(text: str) -> dict[str, Any]:
    """Parse one line. Raises ValueError if it is not an object of a step and its numbers."""
    line = json.loads(text)
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError("it is no step with its numbers")
    for name, value in line.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is no number")
    return line
