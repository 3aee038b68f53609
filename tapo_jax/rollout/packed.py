"""Groups in flight as bytes, and back: an .npz of ids, log-probabilities and images, and one JSON text. No pickle.

A question is kept as the row from which it can be read again, and so are its images; images that tools returned are
kept as arrays, each once.
"""

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapo_jax.rollout.episode import Conversation
from tapo_jax.rollout.groups import Group
from tapo_jax.types import (
    Episode,
    Identity,
    Image,
    Number,
    Prompt,
    Region,
    Text,
    ToolCall,
    ToolResult,
    Turn,
    root_image,
)

KINDS = {kind.__name__: kind for kind in (Region, Text, Identity, Number)}
ARRAYS = {"token": np.int32, "mask": bool, "logp": np.float32, "policy": np.int32}


def pack(groups: Sequence[Group], about: dict[str, Any]) -> bytes:
    """Return groups, and JSON-able values about them, as bytes."""
    images = _Images()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    written = []
    for group in groups:
        seats = [_seat(seat, group.prompt, images, columns) for seat in group.seats]
        written.append({"number": group.number, "row": group.row, "begun": group.begun, "seats": seats})
    arrays = {name: np.concatenate([np.zeros(0, ARRAYS[name]), *parts]) for name, parts in columns.items()}
    arrays |= {f"image_{index}": image.pixels for index, image in enumerate(images.kept)}
    text = {"about": about, "groups": written, "images": [[image.root, image.box] for image in images.kept]}
    arrays["text"] = np.frombuffer(json.dumps(text, default=_plain).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack(
    data: bytes, read: Callable[[int], Prompt], reopen: Callable[[Prompt, int], Conversation]
) -> tuple[list[Group], dict[str, Any]]:
    """Return the groups and values that `pack` got.

    read: returns the question of a row.
    reopen: returns a conversation about a question that has only begun, for the given sample.

    Raises ValueError if the bytes are damaged, or do not belong to these questions.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        text = json.loads(arrays["text"].tobytes())
        places = zip(text["images"], range(len(text["images"])), strict=True)
        kept = [Image(arrays[f"image_{index}"], root, tuple(box)) for (root, box), index in places]
        taken, groups = 0, []
        for item in text["groups"]:
            prompt, seats = read(item["row"]), []
            for sample, seat in enumerate(item["seats"]):
                count = seat["count"] if seat else 0
                columns = {name: arrays[name][taken : taken + count].astype(ARRAYS[name]) for name in ARRAYS}
                seats.append(_unseat(seat, sample, prompt, columns, kept, reopen) if seat else None)
                taken += count
            groups.append(Group(prompt, seats, number=item["number"], row=item["row"], begun=item["begun"]))
    except (OSError, LookupError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"what was in flight cannot be read: {type(error).__name__}: {error}") from error
    return groups, text["about"]


class _Images:
    """The images that are kept as arrays, each once."""

    def __init__(self) -> None:
        self.kept: list[Image] = []
        self._index: dict[int, int] = {}

    def place(self, image: Image) -> int:
        """Return the index of an image."""
        if id(image) not in self._index:
            self._index[id(image)] = len(self.kept)
            self.kept.append(image)
        return self._index[id(image)]


def _seat(
    seat: Conversation | Episode | None, prompt: Prompt, images: _Images, columns: dict[str, list[np.ndarray]]
) -> dict[str, Any] | None:
    """Return a seat as JSON-able values; its arrays are appended to the columns."""
    if seat is None:
        return None
    if isinstance(seat, Episode):
        policy_T = np.zeros(len(seat.token_T), np.int32) if seat.policy_T is None else seat.policy_T
        arrays = {"token": seat.token_T, "mask": seat.mask_T, "logp": seat.sampler_logp_T, "policy": policy_T}
        ended = {name: getattr(seat, name) for name in ("answer", "finish", "rewards", "reward", "judged", "word")}
        written: dict[str, Any] = {"ended": ended}
    else:
        state = seat.get_state()
        arrays = {name: state.pop(name) for name in ARRAYS}
        written = {"open": state}
    for name, kind in ARRAYS.items():
        columns[name].append(np.array(arrays[name], kind))
    own = min(len(seat.images), len(prompt.images))
    return written | {
        "count": len(arrays["token"]),
        "own": own,
        "images": [images.place(image) for image in seat.images[own:]],
        "image_start": list(seat.image_start),
        "turns": [_turn(turn, images) for turn in seat.turns],
    }


def _unseat(
    seat: dict[str, Any],
    sample: int,
    prompt: Prompt,
    arrays: dict[str, np.ndarray],
    kept: Sequence[Image],
    reopen: Callable[[Prompt, int], Conversation],
) -> Conversation | Episode:
    turns = [_unturn(turn, kept) for turn in seat["turns"]]
    later, start = [kept[index] for index in seat["images"]], seat["image_start"]
    if "open" in seat:
        made = reopen(prompt, sample)
        opening = made.opening
        if opening.token_T.tolist() != arrays["token"][: len(opening.token_T)].tolist():
            raise ValueError(f"question {prompt.id!r} is another one than when its conversation began")
        lists = {name: array.tolist() for name, array in arrays.items()}
        made.set_state(seat["open"] | lists | {"images": later, "image_start": start, "turns": turns})
        return made
    own = [root_image(pixels_HxWx3) for pixels_HxWx3 in prompt.images] if seat["own"] else []
    return Episode(
        prompt=prompt,
        sample=sample,
        token_T=arrays["token"],
        mask_T=arrays["mask"],
        sampler_logp_T=arrays["logp"],
        policy_T=arrays["policy"],
        images=own + later,
        image_start=start,
        turns=turns,
        **seat["ended"],
    )


def _turn(turn: Turn, images: _Images) -> dict[str, Any]:
    written = {name: getattr(turn, name) for name in ("start", "stop", "text", "opening", "forced", "continues")}
    if turn.call is not None:
        parameters = [{"kind": type(one).__name__, **dataclasses.asdict(one)} for one in turn.call.parameters]
        written["call"] = {"name": turn.call.name, "arguments": turn.call.arguments, "parameters": parameters}
    if turn.result is not None:
        result = turn.result
        parts = [part if isinstance(part, str) else images.place(part) for part in result.parts]
        shown = [] if parts else [images.place(image) for image in result.images]
        rest = {"text": result.text, "error": result.error, "seconds": result.seconds}
        written["result"] = rest | {"images": shown, "parts": parts}
    return written


def _unturn(written: dict[str, Any], kept: Sequence[Image]) -> Turn:
    call, result = written.pop("call", None), written.pop("result", None)
    turn = Turn(**written)
    turn.forced = None if turn.forced is None else (turn.forced[0], turn.forced[1])
    if call is not None:
        parameters = tuple(_parameter(one) for one in call["parameters"])
        turn.call = ToolCall(call["name"], call["arguments"], parameters)
    if result is not None:
        parts = tuple(part if isinstance(part, str) else kept[part] for part in result.pop("parts"))
        turn.result = ToolResult(**result | {"images": tuple(kept[i] for i in result["images"]), "parts": parts})
    return turn


def _parameter(written: dict[str, Any]) -> Any:
    kind = KINDS[written.pop("kind")]
    return kind(**{name: tuple(value) if name == "box" else value for name, value in written.items()})


def _plain(value: Any) -> Any:
    """Return a numpy value as JSON can hold it."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept")
