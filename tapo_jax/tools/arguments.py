"""Check the arguments of a call against the tool's schema, and turn them into what TAPO compares."""

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import jsonschema.protocols

from tapo_jax.tools import values
from tapo_jax.tools.schemas import bounds, kinds, takes_more
from tapo_jax.types import Identity, Image, Number, Origin, Parameter, Region, Text

_TYPES = {"string": str, "integer": int, "number": (int, float), "array": list, "boolean": bool, "object": dict}
_MAX_NAME = 100  # max characters of the policy's text that a message repeats


class BadCall(Exception):
    """The call cannot run. `kind` is one word for the metrics; the message is what the policy reads.

    origin: the service that failed, if it was one.
    """

    def __init__(self, kind: str, message: str, *, origin: Origin | None = None):
        super().__init__(message)
        self.kind, self.origin = kind, origin


def whole_numbers(schema: dict[str, Any], arguments: Any) -> Any:
    """Return the arguments with image numbers as integers, where the schema calls them numbers and they are whole."""
    if not isinstance(arguments, dict):
        return arguments
    properties = schema["function"]["parameters"]["properties"]
    numbers = {
        name: int(value)
        for name, value in arguments.items()
        if isinstance(value, float) and value.is_integer() and name in properties
        if properties[name]["x-kind"] == "image" and properties[name].get("type") != "integer"
    }
    return {**arguments, **numbers} if numbers else arguments


def check_arguments(schema: dict[str, Any], arguments: dict[str, Any], images: Sequence[Image]) -> None:
    """Check types, names, boxes and image numbers. Raises BadCall if one of them does not fit or does not exist.

    schema: with `properties` and `required`, as `schemas.resolved` returns it. What only a JSON schema can say is left
    to `check_schema`.
    """
    parameters, kind_of = schema["function"]["parameters"], kinds(schema)
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise BadCall("bad_arguments", "The arguments must be a JSON object.")
    for name in parameters["required"]:
        if name not in arguments:
            raise BadCall("bad_arguments", f"The argument '{name}' is missing.")
    for name, value in arguments.items():
        if name in parameters["properties"]:
            _check_argument(name, value, parameters["properties"][name].get("type"), kind_of[name], images)
        elif not takes_more(parameters):
            use = f"use {', '.join(parameters['properties'])}" if parameters["properties"] else "this tool takes none"
            raise BadCall("bad_arguments", f"There is no argument '{name[:_MAX_NAME]}': {use}.")
    for name, wrong in ((name, values.problem(value)) for name, value in arguments.items()):
        if wrong is not None:
            raise BadCall("bad_arguments", f"The argument '{name[:_MAX_NAME]}' has {wrong}.")
    _check_images(schema, arguments, images)


def check_schema(validator: jsonschema.protocols.Validator, arguments: dict[str, Any]) -> None:
    """Check the rules of the JSON schema: bounds, enum, items, alternatives. Raises BadCall if one is broken."""
    try:
        error = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    except Exception as wrong:  # a schema that refers to itself without end, a number that overflows
        raise BadCall("bad_arguments", "The arguments cannot be compared with the tool's schema.") from wrong
    if error is not None:
        place = f"The argument '{error.absolute_path[0]}' does not fit" if error.absolute_path else "They do not fit"
        raise BadCall("bad_arguments", f"{place}: {error.message[:200]}.")


def _check_argument(name: str, value: Any, json_type: Any, kind: str, images: Sequence[Image]) -> None:
    if isinstance(json_type, str) and json_type in _TYPES:
        fits = isinstance(value, _TYPES[json_type]) and (not isinstance(value, bool) or json_type == "boolean")
        if not fits:
            raise BadCall("bad_arguments", f"The argument '{name}' must be of type {json_type}.")
    if value is None:
        return  # if the schema allows null, it means that the argument is absent
    if kind == "region":
        check_box(name, value)
    if kind == "image":
        if not _is_integer(value):
            raise BadCall("bad_arguments", f"The argument '{name}' must be of type integer.")
        if not 0 <= value < len(images):
            raise BadCall("bad_image", _no_image(value, images))


def _check_images(schema: dict[str, Any], arguments: dict[str, Any], images: Sequence[Image]) -> None:
    """Check that the image of a box exists: if it is left out, the box is in the default image."""
    kind_of = kinds(schema)
    for name, kind in kind_of.items():
        if kind == "region" and arguments.get(name) is not None:
            number = _image_numbers(schema, arguments)[0][1]
            if not 0 <= number < len(images):
                raise BadCall("bad_image", _no_image(number, images))


def _no_image(number: int, images: Sequence[Image]) -> str:
    named = f"image {number}" if abs(number) < 10**18 else "image of that number"
    if not images:
        return f"There is no {named}: the conversation has no images."
    return f"There is no {named}: the conversation has images 0 to {len(images) - 1}."


def check_box(name: str, box: Any) -> None:
    """Raise BadCall unless the box is [x1, y1, x2, y2] in 0..1000 and not empty."""
    numbers = isinstance(box, list) and len(box) == 4
    numbers = numbers and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    if not numbers or not all(0 <= v <= 1000 for v in box):
        raise BadCall("bad_box", f"'{name}' must be [x1, y1, x2, y2] with numbers from 0 to 1000.")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise BadCall("bad_box", f"'{name}' is empty: x1 must be less than x2, and y1 less than y2.")


def compose(box: Sequence[float], image: Image) -> tuple[float, float, float, float]:
    """Convert a box relative to `image` (0..1) into a box in the image's root."""
    x1, y1, x2, y2 = image.box
    w, h = x2 - x1, y2 - y1
    return (x1 + box[0] * w, y1 + box[1] * h, x1 + box[2] * w, y1 + box[3] * h)


def call_parameters(
    schema: dict[str, Any], arguments: dict[str, Any], images: Sequence[Image]
) -> tuple[Parameter, ...]:
    """Return the arguments as TAPO compares them.

    A box is composed with its image into root coordinates, and then stands for both. Labels and other properties of
    kind "none" are left out, and so is null.
    """
    parameters = schema["function"]["parameters"]
    kind_of = {name: kind for name, kind in kinds(schema).items() if arguments.get(name) is not None}
    boxes = {name: [v / 1000 for v in arguments[name]] for name, kind in kind_of.items() if kind == "region"}
    shown = {name: images[number] for name, number in _image_numbers(schema, arguments)}
    first = next(iter(boxes), None)
    found: list[Parameter] = []
    for name in parameters["properties"]:
        if name in shown:
            image = shown[name]
            found.append(Region(image.root, image.box if first is None else compose(boxes[first], image)))
        elif name in boxes and name != first:  # the first box is at its image's position
            image = next(iter(shown.values()))
            found.append(Region(image.root, compose(boxes[name], image)))
        elif name in kind_of:
            found += _compared(kind_of[name], arguments[name], parameters["properties"][name], parameters)
    return tuple(found)


def _compared(kind: str, value: Any, wanted: dict[str, Any], parameters: dict[str, Any]) -> list[Parameter]:
    if kind == "text":
        return [Text(_one_text(value))]
    if kind == "identity":
        return [Identity(json.dumps(value, sort_keys=True))]
    if kind == "number":
        return [Number(float(value), *bounds(wanted, parameters))]
    return []


def _one_text(value: Any) -> str:
    """Return a text as it is, a list of texts as lines, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _image_numbers(schema: dict[str, Any], arguments: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the image properties and their numbers.

    One that is left out counts only if there is a box and no other image: its number is then the property's default,
    or 0.
    """
    kind_of, properties = kinds(schema), schema["function"]["parameters"]["properties"]
    names = [name for name, kind in kind_of.items() if kind == "image"]
    given = [(name, arguments[name]) for name in names if arguments.get(name) is not None]
    boxed = any(kind == "region" and arguments.get(name) is not None for name, kind in kind_of.items())
    if given or not boxed:
        return given
    default = properties[names[0]].get("default")
    return [(names[0], default if _is_integer(default) else 0)]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
