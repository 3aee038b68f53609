"""Text <-> token ids: the chat template of a model directory, and what one assistant turn says.

Text that comes from outside (questions, passages, tool results) can never become a control token: where it spells one
("<|image_pad|>" in a retrieved page), a space is put into it before encoding.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer

from tapo_jax.config import UserError
from tapo_jax.types import ToolCall

_ASSISTANT = "\x01assistant\x01"  # marks the policy's turn while the template's text around it is measured
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_WHOLE = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*(?:<tool_call>(?:(?!<tool_call>).)*</tool_call>|<answer>(?:(?!<answer>).)*</answer>)\s*",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """What a turn asks for: a call, an answer, or an error that the policy can read. format_ok: exactly
    `<think>…</think>` followed by one `<tool_call>…</tool_call>` with a readable call or one `<answer>…</answer>`."""

    think: str = ""
    call: ToolCall | None = None
    answer: str | None = None
    error: str | None = None
    format_ok: bool = False


def parse_turn(text: str) -> ParsedTurn:
    """Reads one assistant turn, its stop token already removed. Never raises: the text is the policy's."""
    think = _THINK.search(text)
    said = {"think": think.group(1).strip() if think else "", "format_ok": _WHOLE.fullmatch(text) is not None}
    rest = _THINK.sub("", text)
    calls, answers = _CALL.findall(rest), _ANSWER.findall(rest)
    if len(calls) + len(answers) > 1:
        said["format_ok"] = False
        return ParsedTurn(**said, error="Write one <tool_call> or one <answer> in a turn, not several.")
    if answers:
        return ParsedTurn(**said, answer=answers[0].strip())
    if calls:
        call, error = _parse_call(calls[0])
        said["format_ok"] &= error is None
        return ParsedTurn(**said, call=call, error=error)
    said["format_ok"] = False
    if "<tool_call>" in rest:
        return ParsedTurn(**said, error="The <tool_call> is not closed by </tool_call>.")
    return ParsedTurn(**said)


def _parse_call(body: str) -> tuple[ToolCall | None, str | None]:
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return None, "The tool call has half of a surrogate pair (\\ud800 to \\udfff), which is no character."
    except (ValueError, RecursionError) as error:
        return None, f"The tool call is not valid JSON: {str(error)[:120]}."
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, 'A tool call is a JSON object with the fields "name" and "arguments".'
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None, '"arguments" must be a JSON object.'
    return ToolCall(value["name"], arguments), None


class Chat:
    """The tokenizer and the chat template of a model directory.

    Raises UserError where the directory lacks a tokenizer, a template or one of the tokens that the conversation needs.
    """

    def __init__(self, tokenizer: Tokenizer, template: str):
        self.tokenizer = tokenizer
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _tojson
        self._template = environment.from_string(template)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._control = re.compile("|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)))
        self.image_token = self._id("<|image_pad|>")
        self.vision_start, self.vision_end = self._id("<|vision_start|>"), self._id("<|vision_end|>")
        self.stop_ids = (self._id("<|im_end|>"),)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_dir(cls, path: str | pathlib.Path) -> "Chat":
        path = pathlib.Path(path)
        if not (path / "tokenizer.json").is_file():
            raise UserError(
                f"The model directory {path} has no tokenizer.json: give a complete Hugging Face directory."
            )
        standalone = path / "chat_template.jinja"
        if standalone.is_file():
            template = standalone.read_text()
        else:
            config = path / "tokenizer_config.json"
            template = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
        if not template:
            raise UserError(f"The model directory {path} has no chat template: add chat_template.jinja.")
        return cls(Tokenizer.from_file(str(path / "tokenizer.json")), template)

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"The tokenizer has no token {token}: a Qwen-VL tokenizer is needed.")
        return found

    def forbidden_V(self, vocab: int) -> np.ndarray:
        """bool [vocab]: the ids that the policy may not write: vision tokens, and rows of the embedding without a
        token."""
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
        """The same text with every control token broken by a space."""
        return self._control.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def prompt_ids(
        self, question: str, image_tokens: Sequence[int], tools: Sequence[dict[str, Any]], system: str = ""
    ) -> list[int]:
        """System turn with the tools, the user's turn (images first) and the opening of the assistant's turn.

        image_tokens: the number of placeholders of each image.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": _markers(image_tokens) + self.clean(question)})
        return self._encode(self._render(messages, tools, generate=True), image_tokens)

    def tool_response_ids(self, text: str, image_tokens: Sequence[int]) -> list[int]:
        """All that follows the policy's own stop token up to where it writes again."""
        messages = [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": _ASSISTANT},
            {"role": "tool", "content": _markers(image_tokens) + self.clean(text)},
        ]
        rendered = self._render(messages, (), generate=True)
        after = rendered[rendered.index(_ASSISTANT) + len(_ASSISTANT) :]
        return self._encode(after.removeprefix("<|im_end|>"), image_tokens)

    def _render(self, messages: list[dict], tools: Sequence[dict], *, generate: bool) -> str:
        return self._template.render(messages=messages, tools=list(tools) or None, add_generation_prompt=generate)

    def _encode(self, text: str, image_tokens: Sequence[int]) -> list[int]:
        counts = iter(image_tokens)
        ids = []
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            ids.extend([token] * next(counts) if token == self.image_token else [token])
        return ids


def _markers(image_tokens: Sequence[int]) -> str:
    return "<|vision_start|><|image_pad|><|vision_end|>" * len(image_tokens)


def _tojson(value: Any, **options: Any) -> str:
    """Plain JSON, as the published templates expect it (jinja's own filter escapes for HTML)."""
    return json.dumps(value, ensure_ascii=False, **options)
