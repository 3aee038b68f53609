"""The state machine of one conversation: prompt -> turn -> tool -> turn -> … -> answer. Plain Python, no jax.

Token in, token out: the ids given to `add_sampled` are kept as they are; text is decoded only for parsing and never
re-encoded. Any error in a turn becomes either a response that the policy reads or a named finish; nothing here raises
on the policy's output.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapo_jax.rollout.chat import Chat, parse_turn
from tapo_jax.rollout.cut import cut_result
from tapo_jax.rollout.spans import split
from tapo_jax.rollout.turns import WrittenCall
from tapo_jax.tools.sessions import new_episode
from tapo_jax.types import Episode, Image, Prompt, ToolCall, ToolResult, Turn, root_image


@dataclasses.dataclass(frozen=True)
class Limits:
    """The budgets of an episode."""

    max_turns: int
    """Assistant turns of an episode."""
    max_new_tokens: int
    """Tokens of one turn, including its stop token."""
    max_length: int
    """Tokens of the whole episode, including prompt and tool responses."""
    max_image_tokens: int | None = None
    """Image tokens among those of the episode; None: max_length."""
    max_think_tokens: int | None = None
    """Tokens of a turn before its thought is closed by force; None: max_new_tokens."""
    parallel_calls: int = 1
    """Calls of one turn."""
    max_response_tokens: int | None = None
    """Tokens of the text of one response, which is cut after them; None: as many as fit."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """What the samples of one prompt share: its ids and its images."""

    prompt: Prompt
    token_T: np.ndarray
    images: tuple[Image, ...]
    image_tokens: tuple[int, ...]
    """The number of placeholders of each image."""


def open_prompt(
    prompt: Prompt, *, chat: Chat, image_tokens: Callable[[Image], int], tools: Sequence[dict], system: str = ""
) -> Opening:
    """Return a prompt as the policy sees it: the system turn with the tools' schemas, the question and its images.

    image_tokens: returns the number of placeholders of an image.
    """
    images = tuple(root_image(pixels_HxWx3) for pixels_HxWx3 in prompt.images)
    counts = tuple(image_tokens(image) for image in images)
    ids = chat.prompt_ids(prompt.question, counts, tools, system)
    return Opening(prompt, np.array(ids, np.int32), images, counts)


_TAG_TOKENS = 16  # more than "<think>" or "</think>" can be, spelt letter by letter


class Conversation:
    """One episode while it is played.

    image_tokens: returns the number of placeholders of an image.

    The attribute `finish` is None until the episode has ended. `policy` is the step of training whose weights draw the
    tokens that are added next.
    """

    def __init__(
        self,
        opening: Opening,
        sample: int,
        *,
        limits: Limits,
        chat: Chat,
        image_tokens: Callable[[Image], int],
        policy: int = 0,
    ):
        self.opening = opening
        self.sample = sample
        self.limits = limits
        self.token: list[int] = []
        self.images: list[Image] = []
        self.image_start: list[int] = []
        self.turns: list[Turn] = []
        self.answer: str | None = None
        self.finish: str | None = None
        self.policy = policy
        self.id = new_episode()
        """The episode, as stateful tools know it."""
        self._chat = chat
        self._image_tokens = image_tokens
        self._mask: list[bool] = []
        self._logp: list[float] = []
        self._policy: list[int] = []
        self._turn_start = 0
        self._forced: tuple[int, int] | None = None  # tokens of the open turn that closed its thought
        self._thought_over = True  # no need to watch the thought of the open turn
        self._image_count = 0
        self._answers: list[tuple[Turn, ToolResult | None]] = []  # of the message just closed; None: a call to run
        if self._fits(opening.token_T, opening.image_tokens):
            self._append(opening.token_T.tolist(), opening.images, opening.image_tokens)
            self._begin_turn()
        else:
            self.finish = "length"  # no room for one token: an episode of no turns, which the sampler never sees

    @property
    def turn_tokens(self) -> int:
        """Return the number of tokens of the open turn, including those that closed its thought by force."""
        return len(self.token) - self._turn_start

    @property
    def allowance(self) -> int:
        """Return the max tokens that may be added to the open turn before the next check; 0: the turn is over.

        While a thought has a budget, this is at most the rest of that budget.
        """
        if self._thought_over:
            return self._left
        return min(self._left, self.limits.max_think_tokens - self.turn_tokens)

    @property
    def _left(self) -> int:
        return min(self.limits.max_new_tokens - self.turn_tokens, self.limits.max_length - len(self.token))

    @property
    def waits(self) -> bool:
        """Return whether the last message has calls whose results are still to come."""
        return self.finish is None and bool(self._answers)

    @property
    def pending(self) -> list[ToolCall]:
        """Return the calls of the last message whose results are still to come."""
        return [turn.call for turn, wrong in self._answers if wrong is None]

    def add_sampled(self, token_N: Sequence[int], logp_N: Sequence[float]) -> None:
        """Add tokens that the sampler drew for the open turn, including the stop token, with their log-probabilities.

        If they use up the budget of an open thought, the tokens that close it are appended too, outside the mask:
        `token` then grows by more than what was drawn, and the next draw has to follow all of it.
        """
        self.token.extend(int(token) for token in token_N)
        self._logp.extend(float(logp) for logp in logp_N)
        self._mask.extend([True] * len(token_N))
        self._policy.extend([self.policy] * len(token_N))
        if not self._thought_over:
            self._watch_thought(len(token_N))

    def _begin_turn(self) -> None:
        self._turn_start, self._forced = len(self.token), None
        self._thought_over = self.limits.max_think_tokens is None or "</think>" in self._chat.opening

    def _watch_thought(self, drawn: int) -> None:
        """Stop watching if the thought is closed or was never opened, and close a thought whose budget is spent.

        Only the first and the last tokens are decoded, so that a long thought costs no more than a short one.
        """
        start, chat = self._turn_start, self._chat
        head = (chat.opening + chat.decode(self.token[start : start + _TAG_TOKENS])).lstrip()
        opened = head.startswith("<think>")
        closed = "</think>" in chat.decode(self.token[max(start, len(self.token) - drawn - _TAG_TOKENS) :])
        spent = self.turn_tokens >= self.limits.max_think_tokens
        stopped = self.token[-1] in chat.stop_ids
        self._thought_over = closed or stopped or spent or not (opened or "<think>".startswith(head))
        if opened and spent and not closed and not stopped and self._left > len(chat.end_of_thought):
            self._forced = (len(self.token), len(self.token) + len(chat.end_of_thought))
            self._append(chat.end_of_thought, (), ())

    @property
    def messages(self) -> int:
        """Return the number of the policy's messages that are closed; one with several calls is several turns."""
        return sum(not turn.continues for turn in self.turns)

    def end_turn(self) -> ToolCall | None:
        """Close the turn and return the call to execute.

        None: the episode has finished or a response was appended.
        """
        return next(iter(self.end_turns()), None)

    def end_turns(self) -> list[ToolCall]:
        """Close the policy's message and return the calls to execute, whose results go to `add_results`.

        []: the episode has finished or a response was appended.
        """
        stopped = self.token[-1] in self._chat.stop_ids
        ids = self.token[self._turn_start : len(self.token) - int(stopped)]
        opening = self._chat.opening
        turn = Turn(
            start=self._turn_start,
            stop=len(self.token),
            text=self._chat.decode(ids),
            opening=opening,
            forced=self._forced,
        )
        self.turns.append(turn)
        if not stopped:
            self.finish = "length"
            return []
        several = {"most_calls": self.limits.parallel_calls} if self.limits.parallel_calls > 1 else {}
        parsed = parse_turn(opening + turn.text, **several)
        written = parsed.calls or (WrittenCall(parsed.call, parsed.error, 0),)
        if parsed.calls:
            ends = [call.stop - len(opening) for call in written]
            self.turns[-1:] = split(turn, ends, self.token, self._chat.decode)
        for part, call in zip(self.turns[-len(written) :], written, strict=True):
            part.call = call.call
        if parsed.answer is not None:
            self.answer = parsed.answer
            self.finish = "answer"
        elif parsed.call is None and parsed.error is None and not parsed.calls:
            self.finish = "malformed"
        elif self.messages >= self.limits.max_turns:
            self.finish = "turns"  # a call is not executed if no turn is left to read its result
        else:
            return self._to_run(written)
        return []

    def _to_run(self, written: Sequence[WrittenCall]) -> list[ToolCall]:
        """Return the calls of the message to execute; what is no call gets its response here."""
        wrong = [None if call.error is None else ToolResult(text=call.error, error="unparsable") for call in written]
        self._answers = list(zip(self.turns[-len(written) :], wrong, strict=True))
        calls = [call.call for call in written if call.call is not None]
        if not calls:
            self.add_results([])
        return calls

    def add_result(self, call: ToolCall | None, result: ToolResult) -> None:
        """Append the response to the turn just closed, which had one call.

        If the whole response does not fit into the budget, nothing is appended: an image is never cut.
        """
        self.add_results([(call, result)])

    def add_results(self, ran: Sequence[tuple[ToolCall | None, ToolResult]]) -> None:
        """Append the responses to the message just closed: of its calls, in their order.

        If not all of them fit into the budget, none is appended.
        """
        results, responses, before = iter(ran), [], len(self.images)
        shown: list[Image] = []
        for turn, wrong in self._answers or [(self.turns[-1], None)]:
            call, result = (None, wrong) if wrong is not None else next(results)
            if shown and result.text_from is not None:
                result = dataclasses.replace(result, text=result.text_from(before + len(shown)))
            turn.call, turn.result, counts = call, *self._readable(result)
            responses.append((turn.result.text, counts, turn.result.parts))
            shown += turn.result.images
        self._answers = []
        ids, counts = self._chat.tool_responses_ids(responses), [n for _, some, _ in responses for n in some]
        if not self._fits(ids, counts):
            self.finish = "length"
            return
        self._append(ids, shown, counts)
        self._begin_turn()

    def _readable(self, result: ToolResult) -> tuple[ToolResult, list[int]]:
        """Return a result as the policy can read it, its text cut to the budget, and the tokens of its images."""
        try:
            counts = [self._image_tokens(image) for image in result.images]
        except ValueError as error:  # e.g. a crop 300 times as long as wide: the model cannot take it
            result, counts = ToolResult(text=f"Error: {error}.", error="bad_image", seconds=result.seconds), []
        if self.limits.max_response_tokens is not None:
            result = cut_result(result, self.limits.max_response_tokens, self._chat)
        return result, counts

    def _fits(self, tokens: Sequence[int], counts: Sequence[int]) -> bool:
        """Return whether tokens not from the policy, `counts` of them of images, leave room for one from the policy."""
        most = self.limits.max_length if self.limits.max_image_tokens is None else self.limits.max_image_tokens
        return len(self.token) + len(tokens) < self.limits.max_length and self._image_count + sum(counts) <= most

    def _append(self, tokens: Sequence[int], images: Sequence[Image], counts: Sequence[int]) -> None:
        """Append tokens that the policy did not write."""
        places = [at for at, token in enumerate(tokens) if token == self._chat.image_token]
        if len(places) != sum(counts):
            raise ValueError(
                f"{len(places)} image placeholders in the ids for {sum(counts)} image tokens of {len(images)} images"
            )
        firsts = np.cumsum([0, *counts])[:-1]
        self.image_start.extend(len(self.token) + places[first] for first in firsts)
        self._image_count += sum(counts)
        self.images.extend(images)
        self.token.extend(tokens)
        self._mask.extend([False] * len(tokens))
        self._logp.extend([0.0] * len(tokens))
        self._policy.extend([self.policy] * len(tokens))

    def get_state(self) -> dict[str, Any]:
        """Return what `set_state` needs besides images and turns: plain values, and lists of tokens."""
        return {
            "token": self.token,
            "mask": self._mask,
            "logp": self._logp,
            "policy": self._policy,
            "now": self.policy,
            "turn_start": self._turn_start,
            "forced": self._forced,
            "thought_over": self._thought_over,
            "image_count": self._image_count,
            "answers": [wrong if wrong is None else wrong.text for _, wrong in self._answers],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_state` was called on a conversation of the same opening and sample.

        state: its result, with "turns", "image_start" and "images", the images after those of the question.
        """
        self.token, self._mask, self._logp = list(state["token"]), list(state["mask"]), list(state["logp"])
        self._policy, self.policy = list(state["policy"]), state["now"]
        self._turn_start, self._thought_over = state["turn_start"], state["thought_over"]
        self._forced = None if state["forced"] is None else (state["forced"][0], state["forced"][1])
        self._image_count = state["image_count"]
        self.turns, self.image_start = list(state["turns"]), list(state["image_start"])
        self.images = [*self.opening.images, *state["images"]]
        wrong = [None if text is None else ToolResult(text=text, error="unparsable") for text in state["answers"]]
        self._answers = list(zip(self.turns[len(self.turns) - len(wrong) :], wrong, strict=True))

    def episode(self) -> Episode:
        """Return the finished episode, or raise ValueError while it is still being played."""
        if self.finish is None:
            raise ValueError("the conversation has not finished")
        return Episode(
            prompt=self.opening.prompt,
            sample=self.sample,
            token_T=np.array(self.token, np.int32),
            mask_T=np.array(self._mask, bool),
            sampler_logp_T=np.array(self._logp, np.float32),
            policy_T=np.array(self._policy, np.int32),
            images=self.images,
            image_start=self.image_start,
            turns=self.turns,
            answer=self.answer,
            finish=self.finish,
        )
