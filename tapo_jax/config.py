"""Parse the arguments of config files and flags, do the simplest checks, and end a program on a user's mistake.

This file has no defaults: the files in `configs/` are complete. It imports no jax, so that a config can be read
anywhere.
"""

import ast
import io
import os
import re
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict


class UserError(Exception):
    """A mistake in the user's input. The message is one sentence that names the field and says how to fix it."""


class BadImage(UserError):
    """An image that cannot be shown. The message names it and says why. Training skips its question."""


def key_from(variable: str) -> str:
    """Return the key that an environment variable holds, "" if it is not set.

    Raises UserError if it has characters that no header has; the message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError(f"The key in the environment variable {variable} has characters that no key has.")
    return key


def run_main(main: Callable[[list[str]], None], *, words: bool = False) -> None:
    """Run `main` as absl's `app.run` does; a UserError is printed as its message and ends the program with code 1.

    Fields like data.source can name modules in the working directory.

    words: whether the program takes positional arguments; if not, one is an error, because absl would ignore it.
    """
    sys.path.append(os.getcwd())
    write_to_any_terminal()
    try:
        app.run(main, flags_parser=lambda args: _parse_flags(args, words=words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def write_to_any_terminal() -> None:
    """Print a question mark for a character that the terminal cannot encode, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parse_flags(args: list[str], *, words: bool) -> list[str]:
    """Parse as absl does, but raise UserError for mistakes that absl ignores or reports as a traceback.

    These are: a --config.… flag without such a field, a config file that does not exist, a word that belongs to no
    flag, and a flag with an empty value.
    """
    args, nothing = _take_none(args)
    args, extra = _take_extra(args)
    sys.argv = args  # ml_collections reads the fields of a config from here
    # Otherwise libraries log every step of their work; --verbosity=0 shows it.
    logging.set_verbosity(logging.WARNING)
    try:
        rest = app.parse_flags_with_usage(args)
        if "config" in flags.FLAGS:
            flags.FLAGS["config"].value.is_locked  # noqa: B018 - an unreadable file raises when it is accessed
    except OSError as error:
        raise UserError("--config names a file that cannot be read: give FILE.py or FILE.py:ARGUMENT.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sentence = str(error).strip("'\"").replace("\\'", "'").replace("\\n", " ").replace("\n", " ")
        raise UserError(f"A --config.… flag does not fit the config: {sentence}.") from error
    if rest[1:] and not words:
        raise UserError(
            f"The word '{rest[1]}' on the command line belongs to no flag: write a value with an equals sign, such as "
            f"--config.tapo.beta=0.4, and for a flag that is true or false --flag=false or --noflag."
        )
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present and flag.value == "" and flag.default != "" and not name.startswith("config."):
            raise UserError(f"--{name} is empty (a variable that is not set?): give it a value, or leave it out.")
    for section, name, value in extra:
        first, second = section.split(".")
        with flags.FLAGS["config"].value[first][second].unlocked() as free:
            free[name] = value
    for name in nothing:
        _set_none(flags.FLAGS["config"].value, name)
    return rest


_NONE = re.compile(r"--config\.([\w.]+)=[Nn]one")


def _take_none(args: list[str]) -> tuple[list[str], list[str]]:
    """Split off --config.NAME=None, which a number's parser would reject and a string's would keep as text."""
    found = [_NONE.fullmatch(arg) for arg in args]
    rest = [arg for arg, match in zip(args, found, strict=True) if match is None or ".extra." in match[1]]
    return rest, [match[1] for match in found if match is not None and ".extra." not in match[1]]


def _set_none(config: ConfigDict, name: str) -> None:
    """Set a field to None, whatever its type; the ranges of the fields say which of them allow None."""
    *sections, field = name.split(".")
    for section in sections:
        config = config.get(section) if isinstance(config, ConfigDict) else None
    if not isinstance(config, ConfigDict) or field not in config:
        raise UserError(f"A --config.… flag does not fit the config: there is no field {name}.")
    with config.ignore_type():
        config[field] = None


_EXTRA = re.compile(r"--config\.((?:data|tools|reward)\.extra|tools\.request)\.(\w+)=(.*)", re.DOTALL)


def _take_extra(args: list[str]) -> tuple[list[str], list[tuple[str, str, Any]]]:
    """Split off the fields that the user names: --config.data.extra.NAME=VALUE, --config.tools.request.NAME=VALUE.

    A value is parsed as a Python literal if possible, else kept as text.
    """
    rest, extra = [], []
    for arg in args:
        found = _EXTRA.fullmatch(arg)
        if found is None:
            rest.append(arg)
            continue
        try:
            value = ast.literal_eval(found[3])
        except (ValueError, SyntaxError):
            value = found[3]
        extra.append((found[1], found[2], value))
    return rest, extra


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parse a config file's string argument, such as "steps=20,seed=1,test", by the names and types of `defaults`.

    A bare name sets a bool to True. Raises UserError for an unknown name or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (part.strip() for part in arg.split(","))):
        name, separator, text = item.partition("=")
        if name not in defaults:
            raise UserError(
                f"Unknown config argument '{name}': the arguments of this config are {', '.join(defaults)}."
            )
        kind = type(defaults[name])
        if not separator and kind is not bool:
            raise UserError(
                f"Config argument '{name}' needs a value: write {name}={defaults[name]!r} or another {kind.__name__}."
            )
        values[name] = _parse_value(name, text if separator else "true", kind)
    return ConfigDict(values)


def _parse_value(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise UserError(f"Config argument '{name}' is true or false, not '{text}'.")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"Config argument '{name}' must be of type {kind.__name__}, and '{text}' is not.") from error


def beside(config_file: str, name: str, function: str = "get_config") -> Callable:
    """Return a function of another config file in the same folder (the folder is not a package)."""
    return runpy.run_path(str(Path(config_file).with_name(name)))[function]


def total_steps(steps: int, epochs: float, examples: int, prompts_per_step: int) -> int:
    """Return the number of training steps: `steps`, or if epochs > 0, that many passes over the prompts, at least 1."""
    if epochs > 0:
        return max(1, round(epochs * examples / prompts_per_step))
    return steps


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{field} is '{value}': choose one of {', '.join(choices)}.")


def check_positive(field: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{field} is {value}: it must be greater than 0.")


def flat(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Flatten nested names: {"a": {"b": 1}} -> {"a.b": 1}."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping | ConfigDict) else {prefix + name: value}
    return values
