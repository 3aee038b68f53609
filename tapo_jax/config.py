"""Arguments of the config files, the simplest checks, and how a user's mistake ends a program.

Holds no defaults: the files in `configs/` are complete. Imports no jax, so that a config can be read anywhere.
"""

import ast
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
    """A mistake in what the user gave. The message is one sentence that names the field and the way out."""


class BadImage(UserError):
    """An image that cannot be shown. The message names it and says why. Training skips its question."""


def run_main(main: Callable[[list[str]], None]) -> None:
    """absl's `app.run`; a UserError is printed as its sentence and ends the program with code 1, no traceback. Modules
    of the working directory can be named in fields like data.source."""
    sys.path.append(os.getcwd())
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _parse_flags(args: list[str]) -> list[str]:
    """absl's parsing; a --config.… flag that the config has no field for, or a config file that does not exist, is a
    UserError."""
    args, extra = _take_extra(args)
    # Libraries report every step of their work otherwise; --verbosity=0 shows it.
    logging.set_verbosity(logging.WARNING)
    try:
        rest = app.parse_flags_with_usage(args)
        if "config" in flags.FLAGS:
            flags.FLAGS["config"].value.is_locked  # noqa: B018 - a file that could not be read says so when it is looked at
    except OSError as error:
        raise UserError("--config names a file that cannot be read: give FILE.py or FILE.py:ARGUMENT.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sentence = str(error).strip("'\"").replace("\\'", "'").replace("\\n", " ").replace("\n", " ")
        raise UserError(f"A --config.… flag does not fit the config: {sentence}.") from error
    for section, name, value in extra:
        with flags.FLAGS["config"].value[section].extra.unlocked() as free:
            free[name] = value
    return rest


_EXTRA = re.compile(r"--config\.(data|tools|reward)\.extra\.(\w+)=(.*)", re.DOTALL)


def _take_extra(args: list[str]) -> tuple[list[str], list[tuple[str, str, Any]]]:
    """Split off the free fields for a user's own functions: --config.data.extra.NAME=VALUE, and so on.

    A value is a Python literal, or else text.
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
    """Reads a config file's string argument, `"steps=20,seed=1,test"`, against the names and types of `defaults`.

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
    """A function of another config file in the same folder (the folder is no package)."""
    return runpy.run_path(str(Path(config_file).with_name(name)))[function]


def total_steps(steps: int, epochs: float, examples: int, prompts_per_step: int) -> int:
    """Steps of the loop: `steps`, or where epochs > 0 that many passes over `examples` prompts, at least one."""
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
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping | ConfigDict) else {prefix + name: value}
    return values
