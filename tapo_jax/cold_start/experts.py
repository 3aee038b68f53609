"""Scripted players of Atlas, for the cold start.

They know the scene, follow the tools' results and make mistakes on purpose. An expert copies only from what it was
shown, so a policy that imitates it learns to look things up. Reinforcement learning has to remove its mistakes.
"""

import dataclasses
import json
import re
from collections.abc import Generator, Sequence

import numpy as np

from tapo_jax.atlas import closed
from tapo_jax.atlas.questions import Question
from tapo_jax.atlas.scene import Placed
from tapo_jax.atlas.world import ATTRIBUTES, NEIGHBOURS
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Conversation, Limits, Opening
from tapo_jax.tools.base import ToolRunner
from tapo_jax.types import IMAGE_SEARCH, TEXT_SEARCH, ZOOM, Episode

Script = Generator[str, str, None]  # yields a turn's text, is sent the tool's response


@dataclasses.dataclass(frozen=True)
class Flaws:
    """Probabilities of the deliberate mistakes, each at every opportunity to make it."""

    skip_zoom: float = 0.45  # searches with the whole scene
    wrong_outline: float = 0.08  # looks at another country of the scene
    sloppy_box: float = 0.15  # a box far from the outline
    bad_call: float = 0.03  # a call that fails; it is then corrected
    wrong_image: float = 0.15  # searches with the scene after zooming
    wrong_title: float = 0.14  # takes the second title
    wrong_attribute: float = 0.30  # looks up something else
    skip_hop: float = 0.45  # asks about a country one hop too early
    wrong_relation: float = 0.20  # largest for smallest
    early_answer: float = 0.20  # answers with a title
    wrong_line: float = 0.10  # answers with the value of another line
    guess: float = 0.0  # of questions with a small set of answers: answers at once, with any of the set


def play(opening: Opening, script: Script, *, runner: ToolRunner, chat: Chat, limits: Limits, image_tokens) -> Episode:
    """Let a script play an episode through the same state machine and the same tools as the policy."""
    conversation = Conversation(opening, 0, limits=limits, chat=chat, image_tokens=image_tokens)
    text = next(script)
    while conversation.finish is None:
        ids = [*chat.tokenizer.encode(text, add_special_tokens=False).ids, chat.stop_ids[0]]
        conversation.add_sampled(ids, [0.0] * len(ids))
        call = conversation.end_turn()
        response = ""
        if call is not None:
            call, result = runner.run(call, conversation.images)
            conversation.add_result(call, result)
            response = result.text
        if conversation.finish is None:
            text = script.send(response)
    return conversation.episode()


def expert(question: Question, scene: Sequence[Placed], rng: np.random.Generator, flaws: Flaws) -> Script:
    """Yield the turns of one episode."""
    if question.options and _happens(rng, flaws.guess):
        yield answer_turn(str(rng.choice(question.options)))
        return
    if question.attribute in closed.PAIRS:
        yield from _compare(question, scene, rng, flaws)
        return
    titles, _ = yield from _identify(question.chain[0], scene, rng, flaws)
    name = titles[1] if len(titles) > 1 and _happens(rng, flaws.wrong_title) else titles[0]
    if _happens(rng, flaws.early_answer):
        yield answer_turn(name)
        return
    for relation in question.relations:
        if _happens(rng, flaws.skip_hop):
            break
        if _happens(rng, flaws.wrong_relation):
            relation = next(other for other in NEIGHBOURS if other != relation)
        result = yield search_call(name, "neighbours")
        found = _read(result, name, relation)
        if not found:
            break
        name = found
    attribute = question.attribute
    if _happens(rng, flaws.wrong_attribute):
        attribute = str(rng.choice(ATTRIBUTES))
    result = yield search_call(name, attribute)
    values = re.findall(r": ([^:\n]+?)\.(?: |$)", result, re.MULTILINE)
    right = _read(result, name, attribute)
    if values and (not right or _happens(rng, flaws.wrong_line)):
        right = str(rng.choice(values))
    yield answer_turn(right or name)


def _compare(question: Question, scene: Sequence[Placed], rng: np.random.Generator, flaws: Flaws) -> Script:
    """Yield the turns of a question about the first two countries of the scene."""
    names, images = [], 1
    for placed in scene[:2]:
        titles, images = yield from _identify(placed.name, scene, rng, flaws, images)
        names.append(titles[1] if len(titles) > 1 and _happens(rng, flaws.wrong_title) else titles[0])
    if _happens(rng, flaws.early_answer):
        yield answer_turn(names[0])
        return
    wrong = _happens(rng, flaws.wrong_attribute)
    _, key, words = closed.PASSAGES[question.attribute]
    if wrong:
        key = words = str(rng.choice(ATTRIBUTES))
    values = []
    for name in names[: closed.look_ups(question)]:
        result = yield search_call(name, words)
        values.append(_read(result, name, key) or name)
    if wrong:
        yield answer_turn(values[0])
    elif question.attribute == "border":
        yield answer_turn("yes" if names[1] in values[0].split(", ") else "no")
    else:
        first, second = (int(re.sub(r"\D", "", value) or "0") for value in values)
        yield answer_turn(scene[0].colour if first > second else scene[1].colour)


def _identify(
    name: str, scene: Sequence[Placed], rng: np.random.Generator, flaws: Flaws, images: int = 1
) -> Generator[str, str, tuple[list[str], int]]:
    """Look at a country and search its name. images: of the conversation so far. Return (titles, images)."""
    target = next(placed for placed in scene if placed.name == name)
    if _happens(rng, flaws.wrong_outline):
        target = scene[int(rng.integers(len(scene)))]
    image = 0
    if not _happens(rng, flaws.skip_zoom):
        box = _box(target.box, rng, sloppy=_happens(rng, flaws.sloppy_box))
        if _happens(rng, flaws.bad_call):
            yield zoom_call([box[2], box[3], box[0], box[1]], target.colour)
        yield zoom_call(box, target.colour)
        image, images = (0 if _happens(rng, flaws.wrong_image) else images), images + 1
    result = yield tool_call("search the image", IMAGE_SEARCH, {"img_idx": image})
    return re.findall(r"^\d+\. (.+)$", result, re.MULTILINE) or ["unknown"], images


def zoom_turn(target: Placed, rng: np.random.Generator) -> str:
    """Return the turn that looks at an outline, with a careful box."""
    return zoom_call(_box(target.box, rng, sloppy=False), target.colour)


def _box(box: Sequence[float], rng: np.random.Generator, *, sloppy: bool) -> list[int]:
    """Return an outline's box with a margin, in thousandths rounded to tens; a sloppy one is also moved and scaled."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    margin = 0.15 * max(w, h)
    noise = rng.normal(size=4) * (0.25 if sloppy else 0.02) * np.array([w, h, w, h])
    corners = np.array([x1 - margin, y1 - margin, x2 + margin, y2 + margin]) + noise
    corners = np.clip(np.round(corners * 100), 0, 100).astype(int) * 10
    x1, y1, x2, y2 = corners.tolist()
    return [min(x1, x2 - 30), min(y1, y2 - 30), x2, y2] if x2 > 30 and y2 > 30 else [0, 0, 300, 300]


def _read(result: str, name: str, key: str) -> str | None:
    """Return the value of "the {key} …: value." in the passage about `name`, else in the first passage with one."""
    passages = re.split(r"^\d+\. ", result, flags=re.MULTILINE)
    for passage in sorted(passages, key=lambda passage: not passage.startswith(f"{name}, ")):
        found = re.search(rf"[Tt]he {re.escape(key)}(?: of [^:\n]+)?: ([^:\n]+?)\.(?: |$)", passage, re.MULTILINE)
        if found:
            return found.group(1)
    return None


def zoom_call(box: list[int], colour: str) -> str:
    return tool_call(f"zoom in on {colour}", ZOOM, {"bbox_2d": box, "label": colour, "img_idx": 0})


def search_call(name: str, what: str) -> str:
    return tool_call(f"find the {what}", TEXT_SEARCH, {"query": f"{name}, {what}"})


def tool_call(think: str, name: str, arguments: dict) -> str:
    return f"<think>{think}</think><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def answer_turn(text: str) -> str:
    return f"<think>answer</think><answer>{text}</answer>"


def _happens(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)
