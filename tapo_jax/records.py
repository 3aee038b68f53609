"""Recorded episodes: what the viewer and the credit report read. One .npz file a step, no pickle.

The file holds one JSON text (`episodes`, uint8) and every distinct image once as PNG bytes (`image_00000`, uint8).
Imports no jax.
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

MOST_PIXELS = 1 << 20  # of a recorded image


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name beside it, and rename it. Makes the folder; text is UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode("utf-8", "replace") if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, *, way: str, needs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a JSON file that holds an object with the names in `needs`.

    Raises UserError where it holds anything else; way: the end of the sentence, what the user can do.
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
    """One assistant turn. `text` is what the policy wrote: never trust it as markup.

    result_images: indices into the episode's images. slot: the tool step k of the turn, -1 where it is no valid step.
    adv_before, adv_after: the advantage of the turn's tokens before and after TAPO; sim, support: of its best cluster.
    witness: (prompt, sample, slot) of the step that it borrowed credit from, None where there was none.
    """

    text: str
    call_name: str | None = None
    call_arguments: dict[str, Any] | None = None
    result: str | None = None
    error: str | None = None
    result_images: tuple[int, ...] = ()
    slot: int = -1
    adv_before: float = 0.0
    adv_after: float = 0.0
    correctable: bool = False
    corrected: bool = False
    sim: float = 0.0
    support: float = 0.0
    witness: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class RecordedEpisode:
    """One conversation. images: PNG bytes in the order of `img_idx`; the first `prompt_images` are the question's.

    judged: False where nobody could say whether the answer is right; it is no wrong answer then.
    """

    step: int
    prompt: int
    sample: int
    prompt_id: str
    question: str
    answers: tuple[str, ...]
    hops: int
    images: tuple[bytes, ...]
    prompt_images: int
    turns: tuple[RecordedTurn, ...]
    answer: str | None
    finish: str
    rewards: dict[str, float]
    reward: float
    success: bool
    advantage: float
    judged: bool = True


def png(pixels_HxWx3: np.ndarray) -> bytes:
    """The image, reduced to about a megapixel where it has more: a page shows no more of it."""
    buffer, image = io.BytesIO(), PillowImage.fromarray(pixels_HxWx3)
    shrink = (image.width * image.height / MOST_PIXELS) ** 0.5
    if shrink > 1:
        image.thumbnail((round(image.width / shrink), round(image.height / shrink)))
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def credit_fields(
    transfer: Any, prompt: int, sample: int, *, steps: int, rollouts: int, pooled: bool
) -> list[dict[str, Any]]:
    """What `record` needs of each tool step of one episode, from a `tapo.CreditTransfer` of numpy arrays.

    steps: K, slots of a rollout. rollouts: of a group, remembered ones of earlier steps included: such a witness, whose
    sample number would be beyond the group, is left out. pooled: witnesses are numbered over the whole batch (TAPO's
    scope "batch").
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
    """credit[k]: the fields adv_after, correctable, corrected, sim, support, witness of tool step k."""
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
                result_images=tuple(index for index in shown if index < len(episode.images)),
                adv_before=advantage,
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
    """Writes all or nothing (a temporary file is renamed)."""
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


# What readers of archives, of JSON and of dataclasses raise for a file that is cut, empty or of something else.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)


def load(path: Path) -> list[RecordedEpisode]:
    """Read the episodes of one step. Raises UserError, which names the file, where it is no recording."""
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
    """Read the bytes of a metrics.jsonl. Returns its lines, and the number and fault of each damaged one.

    A last line without an end was cut short by a kill, which is no damage: it is left out.
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
    """Read one line. Raises ValueError."""
    line = json.loads(text)
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError("it is no step with its numbers")
    for name, value in line.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is no number")
    return line
