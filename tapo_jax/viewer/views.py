"""Describe recorded episodes for the page's template: plain dicts of text, numbers, coordinates and colours."""

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

from PIL import Image as PillowImage

from tapo_jax.records import RecordedEpisode, RecordedTurn
from tapo_jax.rollout.chat import parse_turn
from tapo_jax.types import IMAGE_SEARCH, TEXT_SEARCH, ZOOM
from tapo_jax.viewer.credit_map import credit_map, shade

MAX_SIDE = 512  # pixels; larger images are scaled down on the page
_ICONS = {ZOOM: "Z", IMAGE_SEARCH: "I", TEXT_SEARCH: "T"}

Group = Sequence[RecordedEpisode]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of the page."""

    number: int
    """Index of its element in the page."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    uri: str
    """Its bytes as a data URI."""


class Views:
    """Descriptions of episodes for the template.

    All parts of a page share its images, its colour scale and the anchors of its steps, to which others link."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.pictures: list[Picture] = []
        self._picture: dict[bytes, Picture] = {}
        self._anchors: set[str] = set()
        self._borrowers: dict[str, list[dict[str, str]]] = {}

    def learn(self, episodes: Sequence[RecordedEpisode]) -> None:
        """Collect the steps and who borrowed from them, before anything is described."""
        for episode in episodes:
            for turn in episode.turns:
                if turn.slot < 0:
                    continue
                anchor = _anchor(episode.step, episode.prompt, episode.sample, turn.slot)
                self._anchors.add(anchor)
                if turn.corrected and turn.witness is not None:
                    place = {
                        "anchor": anchor,
                        "label": _label(episode.prompt, turn.witness[0], episode.sample, turn.slot),
                    }
                    self._borrowers.setdefault(_anchor(episode.step, *turn.witness), []).append(place)

    def picture(self, data: bytes) -> Picture:
        if data not in self._picture:
            shown, kind = data, "png"
            with PillowImage.open(io.BytesIO(data)) as image:
                size = image.size
                if max(size) > MAX_SIDE:
                    small = image.convert("RGB")
                    small.thumbnail((MAX_SIDE, MAX_SIDE))
                    buffer, size = io.BytesIO(), small.size
                    small.save(buffer, format="JPEG", quality=85)
                    shown, kind = buffer.getvalue(), "jpeg"
            uri = f"data:image/{kind};base64,{base64.b64encode(shown).decode()}"
            self._picture[data] = Picture(len(self.pictures), *size, uri)
            self.pictures.append(self._picture[data])
        return self._picture[data]

    def group(self, group: Group) -> dict[str, Any]:
        """Describe one question at one step: its images with the boxes of all calls, the credit map, and the episodes.

        Successful episodes come first."""
        first = group[0]
        episodes = [self._episode(e) for e in sorted(group, key=lambda e: (not e.success, e.sample))]
        images = [{"picture": self.picture(data), "boxes": []} for data in first.images[: first.prompt_images]]
        for episode in episodes:
            for turn in episode["turns"]:
                if turn["box"] and turn["target"] < first.prompt_images:
                    kind = "right" if episode["success"] else "fixed" if turn["corrected"] else "wrong"
                    images[turn["target"]]["boxes"].append({"box": turn["box"], "kind": kind, "turn": turn})
        return {
            "step": first.step,
            "prompt": first.prompt,
            "question": first.question,
            "id": first.prompt_id,
            "answers": first.answers,
            "hops": first.hops,
            "images": images,
            "episodes": episodes,
            "map": credit_map(episodes),
            "right": sum(e.success for e in group),
            "corrected": sum(turn.corrected for e in group for turn in e.turns),
        }

    def _episode(self, episode: RecordedEpisode) -> dict[str, Any]:
        turns, seen = [], episode.prompt_images
        for number, turn in enumerate(episode.turns):
            turns.append(self._turn(episode, number, turn, seen))
            seen += len(turn.result_images)
        return {
            "step": episode.step,
            "sample": episode.sample,
            "success": episode.success,
            "judged": episode.judged,
            "answer": episode.answer,
            "finish": episode.finish,
            "rewards": [(name, f"{value:g}") for name, value in episode.rewards.items()],
            "reward": f"{episode.reward:.2f}",
            "advantage": episode.advantage,
            "shade": shade(episode.advantage, self.scale),
            "turns": turns,
            "corrected": sum(turn.corrected for turn in episode.turns),
            "open": False,
        }

    def _turn(self, episode: RecordedEpisode, number: int, turn: RecordedTurn, seen: int) -> dict[str, Any]:
        """Describe a turn. seen: number of images of the conversation before it."""
        parsed = parse_turn(f"<think></think>{turn.text}" if turn.continues else turn.text)
        arguments = turn.call_arguments or {}
        target = _image_number(arguments.get("img_idx"), min(seen, len(episode.images)))
        box = None if target is None else _box(arguments.get("bbox_2d"))
        anchor = _anchor(episode.step, episode.prompt, episode.sample, turn.slot) if turn.slot >= 0 else ""
        target_image = None if target is None else self.picture(episode.images[target])
        return {
            "number": number,
            "label": _turn_label(episode, number),
            "slot": turn.slot,
            "anchor": anchor,
            "icon": _icon(turn, parsed.answer),
            "tool": turn.call_name,
            "think": parsed.think if parsed.format_ok else "",
            "answer": parsed.answer if parsed.format_ok else None,
            "arguments": json.dumps(turn.call_arguments, ensure_ascii=False)
            if parsed.format_ok and turn.call_name
            else None,
            "written": None if parsed.format_ok else turn.text,
            "result": turn.result,
            "error": turn.error,
            "source": turn.source,
            "target": target,
            "box": box,
            "target_image": target_image,
            "results": [(i, self.picture(episode.images[i])) for i in turn.result_images if i < len(episode.images)],
            "before": turn.adv_before,
            "after": turn.adv_after,
            "before_shade": shade(turn.adv_before, self.scale),
            "after_shade": shade(turn.adv_after, self.scale),
            "sim": turn.sim,
            "support": turn.support,
            "corrected": turn.corrected,
            "status": _status(episode, turn),
            "witness": self._witness(episode, turn),
            "borrowers": self._borrowers.get(anchor, []),
        }

    def _witness(self, episode: RecordedEpisode, turn: RecordedTurn) -> dict[str, str] | None:
        """Return where to find the step that this one is most similar to; "" if that is not on the page.

        None for a witness itself, and if there is no such step."""
        if episode.success or not episode.judged or (turn.witness is None and turn.sim == 0):
            return None
        if turn.witness is None:
            return {"anchor": "", "label": "a sample of an earlier step"}  # from the witness memory
        anchor = _anchor(episode.step, *turn.witness)
        prompt, sample, slot = turn.witness
        return {
            "anchor": anchor if anchor in self._anchors else "",
            "label": _label(prompt, episode.prompt, sample, slot),
        }


def _turn_label(episode: RecordedEpisode, number: int) -> str:
    """Return "turn 2", or "turn 2 · call 3" for a further call of the same message."""
    message = sum(not turn.continues for turn in episode.turns[: number + 1])
    first = max((n for n in range(number + 1) if not episode.turns[n].continues), default=0)
    return f"turn {message}" + (f" · call {number - first + 1}" if number > first else "")


def _anchor(step: int, prompt: int, sample: int, slot: int) -> str:
    return f"s{int(step)}-q{int(prompt)}-g{int(sample)}-k{int(slot)}"


def _label(prompt: int, here: int, sample: int, slot: int) -> str:
    """Return the name of a step in the group of prompt `here`."""
    return f"g{sample} k{slot}" if prompt == here else f"question {prompt}, g{sample} k{slot}"


def _icon(turn: RecordedTurn, answer: str | None) -> str:
    if turn.error is not None:
        return "!"
    if turn.call_name is None:
        return "A" if answer is not None else "?"
    return _ICONS.get(turn.call_name, turn.call_name[:1].upper() or "?")


def _status(episode: RecordedEpisode, turn: RecordedTurn) -> str:
    if turn.slot < 0:
        return f"error: {turn.error}" if turn.error else ""
    if not episode.judged:
        return "left out: not judged"
    if turn.corrected:
        return "corrected"
    if episode.success:
        return "witness"
    if turn.correctable:
        return "matches a witness, not corrected"
    return "no witness close enough" if turn.sim > 0 else "no witness"


def _image_number(value: Any, count: int) -> int | None:
    """Return the policy's img_idx if it is the index of an image that it had seen, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count else None


def _box(value: Any) -> tuple[float, float, float, float] | None:
    """Return the policy's [x1, y1, x2, y2], given in thousandths, if that is a box, else None."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1000 for v in value):
        return None
    x1, y1, x2, y2 = (float(v) for v in value)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
