"""Rows of published and users' files: strict about the fields that a question needs, tolerant about all others.

A row that does not fit is a UserError that names the file, the row, the field, what was found and what was expected.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tapo_jax import rewards
from tapo_jax.config import UserError
from tapo_jax.data.json_files import shown
from tapo_jax.types import Images, Prompt

MARK = "<image>"


@dataclasses.dataclass(frozen=True)
class Row:
    """The fields of one row."""

    where: str
    """Like "FILE, line 3", for messages."""
    values: Mapping[str, Any]

    def bad(self, field: str, expected: str) -> UserError:
        """Return an error that says what is wrong with a field. It may be nested: "reward_model.ground_truth"."""
        try:
            found = f"is {shown(self.get(field))}"
        except KeyError:
            found = f"is missing (the row has {', '.join(self.values) or 'no fields'})"
        return UserError(f"{self.where}: the field '{field}' {found}; expected {expected}.")

    def get(self, field: str) -> Any:
        """Return the value of a field, None inside a missing one. Raises KeyError if the row lacks the field."""
        first, *rest = field.split(".")
        value = self.values[first]
        for name in rest:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def optional(self, field: str) -> Any:
        return self.get(field) if field.split(".")[0] in self.values else None

    def text(self, field: str, expected: str = "a text") -> str:
        """Return a text that is not empty and can be encoded. Raises UserError if the field has none."""
        value = self.optional(field)
        if not isinstance(value, str) or not value.strip():
            raise self.bad(field, expected)
        return self.encodable(field, value)

    def encodable(self, field: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.bad(field, "whole characters, and this has half of a surrogate pair") from error
        return value

    def texts(self, field: str, *, as_json: bool = False) -> list[str]:
        """Return the texts of a field that may be missing, null, one text or a list of texts.

        as_json: the list may also be JSON text.
        """
        value = self.optional(field)
        if as_json and isinstance(value, str) and value.strip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise self.bad(field, "a JSON list of texts") from error
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise self.bad(field, "a text or a list of texts")
        return [self.encodable(field, text) for text in found]

    def name(self, field: str, otherwise: str) -> str:
        """Return the row's id, a text or a whole number; `otherwise` if there is none."""
        value = self.optional(field)
        if value is None or value == "":
            return otherwise
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise self.bad(field, "a text or a whole number")
        return self.encodable(field, str(value))

    def rest(self, used: Iterable[str]) -> dict[str, Any]:
        """Return the fields that the question did not use."""
        return {name: value for name, value in self.values.items() if name not in set(used)}


def accepted(row: Row, field: str, answers: Iterable[str]) -> tuple[str, ...]:
    """Return the answers without duplicates and without those that nothing can match.

    Raises UserError if none is left.
    """
    kept = tuple(dict.fromkeys(answer.strip() for answer in answers if rewards.exact_match(answer, (answer,))))
    if not kept:
        raise row.bad(field, "at least one answer with a letter or a digit")
    return kept


def marked(row: Row, field: str, question: str, images: int) -> str:
    """Return the question. Raises UserError if it has `<image>` marks, but not one for each image."""
    marks = question.count(MARK)
    if marks not in (0, images):
        raise row.bad(field, f"no {MARK} mark or one for each of the row's {images} images, and it has {marks}")
    return question


def unique_ids(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts, with a number added to an id reused for another question: equal ids are equal questions."""
    seen: dict[str, tuple] = {}
    made = []
    for number, prompt in enumerate(prompts, start=1):
        asked = (prompt.question, prompt.answers)
        if seen.setdefault(prompt.id, asked) != asked:
            prompt = dataclasses.replace(prompt, id=f"{prompt.id}#{number}")
        made.append(prompt)
    return made


def lazy(sources: Sequence[Callable]) -> Images | tuple[()]:
    """Return images that are decoded on access; () for none."""
    return Images(sources) if sources else ()


def rows_of(path: Path, values: Iterable[Any]) -> Iterator[Row]:
    """Yield the rows of a JSON list, counted from 1. Raises UserError if one is not an object."""
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise UserError(f"{path}, row {number}: found {shown(value)}; expected an object.")
        yield Row(f"{path}, row {number}", value)
