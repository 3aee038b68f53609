"""Convert text to token ids and back with the chat template of a model directory.

Text that comes from outside (questions, passages, tool results) can never become a control token: if it spells one
("<|image_pad|>" in a retrieved page), a space is put into it before encoding.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tapo_jax.config import UserError
from tapo_jax.models import chat_template
from tapo_jax.models.chat_template import ChatTemplate
from tapo_jax.models.model_files import check_no_pointer
from tapo_jax.rollout.turns import ParsedTurn, parse_turn
from tapo_jax.tools.values import whole_text
from tapo_jax.types import Image

__all__ = ["IMAGE_MARK", "Chat", "ParsedTurn", "parse_turn"]

IMAGE_MARK = "<image>"  # marks the position of an image in a question
_ASSISTANT = "\x01assistant\x01"  # marks the policy's turn while the template's text around it is measured
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_HEADER = "<|im_start|>assistant\n"


class Chat:
    """The tokenizer and the chat template of a model directory.

    template: one template, or several by name.
    stop_ids: tokens that end a turn in addition to <|im_end|>.

    The attribute `opening` is what the template itself writes at the beginning of the policy's turn; thinking models
    open a thought there ("<think>\\n").

    Raises UserError if the template cannot be used, or if the tokenizer lacks one of the tokens that the conversation
    needs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | Mapping[str, str],
        *,
        stop_ids: Sequence[int] = (),
        special_tokens: Mapping[str, str] | None = None,
    ):
        self.tokenizer = tokenizer
        named = {chat_template.DEFAULT: template} if isinstance(template, str) else template
        self._template = ChatTemplate(named, special_tokens)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._control = re.compile("|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)))
        self.image_token = self._id("<|image_pad|>")
        self.vision_start, self.vision_end = self._id("<|vision_start|>"), self._id("<|vision_end|>")
        self.stop_ids = tuple(dict.fromkeys((self._id("<|im_end|>"), *stop_ids)))
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.opening = self._opening()
        # Closes a thought that is too long; the policy reads it as if it had written it.
        self.end_of_thought = self._encode("\n</think>\n\n", ())

    @classmethod
    def from_dir(cls, path: str | pathlib.Path) -> "Chat":
        """Return the chat of a model directory.

        Reads tokenizer.json, the chat template from whichever file has it, and the stop tokens of
        generation_config.json.
        """
        path = pathlib.Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"The model directory {path} has no tokenizer.json: give a complete Hugging Face directory "
                "(vocab.json and merges.txt alone are not read; AutoTokenizer's save_pretrained writes tokenizer.json)."
            )
        templates = chat_template.read_templates(path)
        if not templates:
            raise UserError(f"The model directory {path} has no chat template: add chat_template.jinja.")
        check_no_pointer(file)
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{file} cannot be read ({error}): copy or download it again.") from error
        return cls(
            tokenizer,
            templates,
            stop_ids=chat_template.read_stop_ids(path),
            special_tokens=chat_template.read_special_tokens(path),
        )

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"The tokenizer has no token {token}: a Qwen-VL tokenizer is needed.")
        return found

    def _opening(self) -> str:
        """Return `opening`; also render a tool's response, so that a template that cannot fails before any rollout."""
        self.tool_response_ids("", ())
        question = [{"role": "user", "content": "?"}]
        before = self._template.render(question, add_generation_prompt=False)
        turn = self._template.render(question, add_generation_prompt=True).removeprefix(before)
        return turn.partition(_HEADER)[2]

    def forbidden_V(self, vocab: int) -> np.ndarray:
        """Return a bool [vocab] mask of the ids that the policy may not write.

        These are vision tokens, <|im_start|>, and rows of the embedding without a token.
        """
        forbidden_V = np.arange(vocab) >= self.vocab_size
        for name in (
            "<|image_pad|>",
            "<|video_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
            "<|im_start|>",
        ):
            token = self.tokenizer.token_to_id(name)
            if token is not None:
                forbidden_V[token] = True
        return forbidden_V

    def clean(self, text: str) -> str:
        """Return the text with every control token broken by a space and halves of surrogate pairs replaced."""
        return self._control.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", whole_text(text))

    def _clean_all(self, value: Any) -> Any:
        """Clean every text of a schema."""
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, Mapping):
            return {self._clean_all(name): self._clean_all(inner) for name, inner in value.items()}
        return [self._clean_all(inner) for inner in value] if isinstance(value, list | tuple) else value

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def tokens(self, text: str) -> int:
        """Return the number of tokens of a text from outside."""
        return len(self.tokenizer.encode(self.clean(text), add_special_tokens=False).ids)

    def first_tokens(self, text: str, count: int) -> str:
        """Return the beginning of a text from outside that has at most `count` tokens; no character is cut."""
        text = self.clean(text)
        while count > 0:
            spans = self.tokenizer.encode(text, add_special_tokens=False).offsets
            if len(spans) <= count:
                return text
            shorter = text[: spans[count][0]]
            # A shorter text may be encoded in other tokens, more of them at worst.
            if len(shorter) == len(text) or self.tokens(shorter) > count:
                count -= 1
            else:
                return shorter
        return ""

    def prompt_ids(
        self, question: str, image_tokens: Sequence[int], tools: Sequence[dict[str, Any]], system: str = ""
    ) -> list[int]:
        """Return the ids of the system turn with the tools, the user's turn and the opening of the assistant's turn.

        image_tokens: the number of placeholders of each image.

        If a question has exactly as many `<image>` marks as there are images, each image replaces its mark; otherwise
        the images come first.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": self._question(question, len(image_tokens))})
        described = [self._clean_all(tool) for tool in tools]  # a server elsewhere may have written them
        rendered = self._template.render(messages, described, add_generation_prompt=True, with_tools=bool(tools))
        return self._encode(rendered, image_tokens)

    def _question(self, question: str, images: int) -> str:
        if images and question.count(IMAGE_MARK) == images:
            return _IMAGE.join(self.clean(text) for text in question.split(IMAGE_MARK))
        return _IMAGE * images + self.clean(question)

    def tool_response_ids(self, text: str, image_tokens: Sequence[int], parts: Sequence[str | Image] = ()) -> list[int]:
        """Return the ids from after the policy's own stop token to where it writes next.

        parts: text and images in the order in which they are shown; if empty, the images come before the text.
        """
        return self.tool_responses_ids([(text, image_tokens, parts)])

    def tool_responses_ids(self, responses: Sequence[tuple[str, Sequence[int], Sequence[str | Image]]]) -> list[int]:
        """Return the ids of the responses to the calls of one turn, in the order of the calls.

        responses: text, image_tokens and parts of each, as `tool_response_ids` takes them.
        """
        contents = [
            self._parts(parts) if parts else _IMAGE * len(image_tokens) + self.clean(text)
            for text, image_tokens, parts in responses
        ]
        messages = [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": _ASSISTANT},
            *({"role": "tool", "content": content} for content in contents),
        ]
        rendered = self._template.render(messages, add_generation_prompt=True)
        after = rendered.partition(_ASSISTANT)[2]
        counts = [count for _, image_tokens, _ in responses for count in image_tokens]
        return self._encode(after.removeprefix("<|im_end|>"), counts)

    def _parts(self, parts: Sequence[str | Image]) -> str:
        """Join adjacent texts before cleaning them, so that two halves of a control token cannot make one."""
        texts = [""]
        for part in parts:
            if isinstance(part, str):
                texts[-1] += part
            else:
                texts.append("")
        return _IMAGE.join(self.clean(text) for text in texts)

    def _encode(self, text: str, image_tokens: Sequence[int]) -> list[int]:
        counts = iter(image_tokens)
        ids = []
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            ids.extend([token] * next(counts) if token == self.image_token else [token])
        return ids
