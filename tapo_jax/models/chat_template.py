"""Chat templates and stop tokens of a model directory, as transformers finds and renders them. Imports no jax.

A directory may hold one template or several named ones; a conversation with tools is rendered by "tool_use" if that
template exists, everything else by "default".
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tapo_jax.config import UserError
from tapo_jax.models.model_files import read_json, read_text

TOOL_USE, DEFAULT = "tool_use", "default"


class _Generation(jinja2.ext.Extension):
    """The tags `{% generation %}` … `{% endgeneration %}`, which mark the policy's text in templates for training.

    The text between them is rendered unchanged."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """The templates of a model, by name.

    Raises UserError if one is not a Jinja template or none is named "default"."""

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str] | None = None):
        """Compile the templates. tokens: the special tokens (bos_token, …) that a template may use, by name."""
        if DEFAULT not in templates:
            raise UserError(
                f"The model's chat templates are named {', '.join(sorted(templates))}: one must be named '{DEFAULT}'."
            )
        environment = _environment()
        self._tokens = dict(tokens or {})
        self._compiled = {}
        for name, source in templates.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"The chat template '{name}' is no Jinja template (line {error.lineno}: {error.message}): "
                    "take the file of the published model."
                ) from error

    def render(
        self,
        messages: Sequence[dict],
        tools: Sequence[dict] | None = None,
        *,
        add_generation_prompt: bool,
        with_tools: bool = True,
    ) -> str:
        """Render a conversation as text.

        messages: the turns.
        tools: the tools' schemas; may be empty if only the text after the first turns matters.
        add_generation_prompt: append the opening of the policy's turn.
        with_tools: use the template for tools, if there is one.

        Raises UserError if the template cannot render it.
        """
        name = TOOL_USE if with_tools and TOOL_USE in self._compiled else DEFAULT
        shown = list(tools or ()) or ([] if name == TOOL_USE else None)
        try:
            return self._compiled[name].render(
                **self._tokens, messages=messages, tools=shown, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"The chat template '{name}' cannot render a conversation with tools ({error}): "
                "take a template that knows the roles system, user, assistant and tool."
            ) from error


def read_templates(directory: Path) -> dict[str, str]:
    """Return the templates of a directory by name, {} if it has none.

    They are in chat_template.jinja and additional_chat_templates/NAME.jinja, or in the older chat_template.json, or in
    the field chat_template of tokenizer_config.json (a string, or a list of names and templates)."""
    named = {file.stem: read_text(file) for file in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        named[DEFAULT] = read_text(directory / "chat_template.jinja")
    if named:
        return named
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            templates = _by_name(read_json(directory / name).get("chat_template"), directory / name)
            if templates:
                return templates
    return {}


def _by_name(found: Any, file: Path) -> dict[str, str]:
    if not found:
        return {}
    templates = {DEFAULT: found} if isinstance(found, str) else found
    if isinstance(found, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in found]
        templates = {entry.get("name"): entry.get("template") for entry in entries}
    if not isinstance(templates, dict) or not all(isinstance(x, str) for pair in templates.items() for x in pair):
        raise UserError(f"{file}: chat_template is neither a text nor a list of objects with name and template.")
    return templates


def read_special_tokens(directory: Path) -> dict[str, str]:
    """Return the tokens that templates may use, from tokenizer_config.json: {"eos_token": "<|im_end|>", …}."""
    file = directory / "tokenizer_config.json"
    raw = read_json(file) if file.is_file() else {}
    tokens = {}
    for name, value in raw.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def read_stop_ids(directory: Path) -> tuple[int, ...]:
    """Return the stop tokens of generation_config.json, () without one. Raises UserError if one is no token id."""
    file = directory / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise UserError(f"{file}: eos_token_id is {found!r}: give a token id or a list of them.")
    return tuple(ids)


def _environment() -> jinja2.Environment:
    """Return the Jinja environment that transformers gives to a template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, **options: Any) -> str:
    """Return plain JSON, as the published templates expect it (jinja's own filter escapes for HTML)."""
    return json.dumps(value, **{"ensure_ascii": False} | options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
