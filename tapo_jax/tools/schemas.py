"""Read the schema of a tool, as OpenAI, MCP or verl write it, and the kind of each property: how TAPO compares it.

A property may declare its kind with "x-kind": "region" (a box in an image), "image" (a whole image), "text",
"identity", "number" or "none". Otherwise the kind is inferred (`infer_kind`; the table is in docs/extend.md).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import jsonschema.protocols
import referencing.jsonschema

from tapo_jax.config import UserError

KINDS = ("region", "image", "text", "identity", "number", "none")
_IMAGE_NAME = re.compile(r"(img|image)(_?(idx|index|number|num))?")
_BOX_NAME = re.compile(r"(^|_)(bbox|box|region)(_|\d|$)")
_TYPES_OF = {  # kind -> the JSON types that it allows
    "region": {"array", "null"},
    "image": {"integer", "null"},
    "number": {"number", "integer", "null"},
}
_MAX_REFERENCES = 16  # per property: more are a cycle


def function_schema(
    name: str, description: str, properties: dict[str, dict], required: Sequence[str]
) -> dict[str, Any]:
    """Return the schema of a function in OpenAI form."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def resolved(schema: Mapping[str, Any], tool: str, given: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a tool's schema in OpenAI form with `properties`, `required` and every property's "x-kind".

    schema: in OpenAI form ({"type": "function", "function": {…}}), the function alone, or MCP's (`inputSchema`).
    given: property -> kind, instead of what the schema says; an image may then be of type number too.
    Raises UserError, one sentence that names the tool and the property, if the schema cannot be understood.
    """
    found = _openai_form(schema, tool)
    parameters = found["function"]["parameters"]
    try:
        jsonschema.validators.validator_for(parameters, jsonschema.Draft202012Validator).check_schema(parameters)
    except jsonschema.SchemaError as error:
        where = ".".join(map(str, error.absolute_path)) or "parameters"
        raise UserError(
            f"The schema of the tool '{tool}' is no JSON schema at {where}: {error.message[:200]}."
        ) from error
    properties = parameters["properties"]
    for name in properties:
        if not isinstance(properties[name], dict):  # true and false are schemas too
            properties[name] = {} if properties[name] else {"not": {}}
    unknown = [name for name in parameters["required"] if name not in properties]
    if unknown and not takes_more(parameters):
        raise UserError(f"The schema of the tool '{tool}' requires '{unknown[0]}', which is none of its properties.")
    _check_references(parameters, parameters, tool)
    for name, kind in (given or {}).items():
        if name not in properties:
            use = f"its properties are {', '.join(properties)}" if properties else "it has none"
            raise UserError(f"tools.kinds has '{name}' for the tool '{tool}': {use}.")
        properties[name]["x-kind"] = kind
    kind_of = kinds(found)
    for name, kind in kind_of.items():
        _check_kind(tool, name, kind, kind_of, parameters, given or {})
        properties[name]["x-kind"] = kind
    return found


def shown(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved schema as the policy reads it: without "x-kind", which is of no use to it."""
    function = schema["function"]
    parameters = function["parameters"]
    properties = {
        name: {word: value for word, value in wanted.items() if word != "x-kind"}
        for name, wanted in parameters["properties"].items()
    }
    return {**schema, "function": {**function, "parameters": {**parameters, "properties": properties}}}


def validator(schema: Mapping[str, Any]) -> jsonschema.protocols.Validator:
    """Return a validator of arguments against a resolved schema. It never fetches a reference."""
    parameters = shown(schema)["function"]["parameters"]
    made = jsonschema.validators.validator_for(parameters, jsonschema.Draft202012Validator)
    return made(parameters, registry=referencing.jsonschema.EMPTY_REGISTRY)


def takes_more(parameters: Mapping[str, Any]) -> bool:
    """Return whether the schema takes arguments other than its properties."""
    return parameters.get("additionalProperties", False) is not False or "patternProperties" in parameters


def kinds(schema: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of each property: its "x-kind", or the inferred one."""
    parameters = schema["function"]["parameters"]
    found = {
        name: wanted["x-kind"] if "x-kind" in wanted else infer_kind(name, wanted, parameters)
        for name, wanted in parameters["properties"].items()
    }
    if "image" not in found.values():
        for name, wanted in parameters["properties"].items():
            if "x-kind" not in wanted and found[name] == "region":
                found[name] = "none"  # a box in an unknown image
    return found


def infer_kind(name: str, wanted: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Return the kind of a property that has no "x-kind". A region counts as one only with an image property."""
    plain = plain_property(wanted, parameters)
    types = json_types(plain, parameters) - {"null"}
    word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    if "const" in plain:
        return "none"
    if "enum" in plain or types == {"boolean"}:
        return "identity"
    if types == {"integer"} and _IMAGE_NAME.fullmatch(word):
        return "image"
    if types == {"array"}:
        items = plain_property(_dict(plain.get("items")), parameters)
        of = json_types(items, parameters)
        if of == {"string"}:
            return "text"
        thousandths = items.get("minimum", 0) == 0 and items.get("maximum", 1000) == 1000
        return "region" if _BOX_NAME.search(word) and of <= {"number", "integer"} and thousandths else "none"
    if types == {"string"}:
        return "text"
    if types and types <= {"number", "integer"} and bounds(plain, parameters):
        return "number"
    return "none"


def plain_property(wanted: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a property with its references followed, and with its alternative if only one is not null."""
    found = dict(wanted)
    for _ in range(_MAX_REFERENCES):
        if "$ref" in found:
            target = _target(found.pop("$ref"), parameters)
            found = {**_dict(target), **found}
            continue
        word = next((word for word in ("anyOf", "oneOf", "allOf") if _one_meant(found.get(word))), None)
        if word is None:
            return found
        inner = next(branch for branch in found.pop(word) if _dict(branch).get("type") != "null")
        found = {**_dict(inner), **found}
    return found


def _one_meant(branches: Any) -> bool:
    return isinstance(branches, list) and sum(_dict(branch).get("type") != "null" for branch in branches) == 1


def json_types(wanted: Mapping[str, Any], parameters: Mapping[str, Any]) -> set[str]:
    """Return the JSON types that a property can have; the empty set if it declares none."""
    if "type" in wanted:
        return {wanted["type"]} if isinstance(wanted["type"], str) else set(wanted["type"])
    for word in ("anyOf", "oneOf"):
        if word in wanted:
            branches = [plain_property(_dict(branch), parameters) for branch in wanted[word]]
            # Only one level deep: no kind depends on alternatives of alternatives.
            names = [branch.get("type", []) for branch in branches]
            each = [{name} if isinstance(name, str) else set(name) for name in names]
            return set().union(*each) if all(each) else set()
    return set()


def bounds(wanted: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the range of a number, None if it has no lower or upper bound or is empty."""
    plain = plain_property(wanted, parameters)
    ends = []
    for word in ("inimum", "aximum"):
        names = (f"m{word}", f"exclusiveM{word}")
        end = next((plain[name] for name in names if _is_number(plain.get(name))), None)
        if end is None:
            return None
        ends.append(end)
    try:
        low, high = map(float, ends)
    except OverflowError:
        return None
    return (low, high) if low < high and math.isfinite(high - low) else None


def _check_kind(
    tool: str,
    name: str,
    kind: Any,
    kind_of: Mapping[str, Any],
    parameters: Mapping[str, Any],
    given: Mapping[str, str],
) -> None:
    place = f"The property '{name}' of the tool '{tool}'"
    if kind not in KINDS:
        raise UserError(f"{place} has x-kind {kind!r}: use one of {', '.join(KINDS)}, or leave it out.")
    wanted = plain_property(parameters["properties"][name], parameters)
    types = json_types(wanted, parameters)
    if kind == "image" and name in given:
        types -= {"number"}  # a schema of others, whose whole numbers are meant
    if kind in _TYPES_OF and not types <= _TYPES_OF[kind]:
        takes = " or ".join(sorted(_TYPES_OF[kind] - {"null"}))
        raise UserError(f"{place} has x-kind '{kind}' and type {' or '.join(sorted(types))}: give it type {takes}.")
    if kind == "region" and "image" not in kind_of.values():
        raise UserError(
            f"{place} has x-kind 'region', and the tool has no property of kind image that says which image the box "
            "is in: add an integer property with x-kind 'image'."
        )
    if kind == "number" and bounds(wanted, parameters) is None:
        raise UserError(
            f"{place} has x-kind 'number' without a range: give it minimum and maximum, the first less than the second."
        )


def _openai_form(schema: Any, tool: str) -> dict[str, Any]:
    """Return a copy in plain JSON, whose function has parameters with properties and required."""
    try:
        found = json.loads(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"The schema of the tool '{tool}' is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"The schema of the tool '{tool}' is no object: use tapo_jax.tools.function_schema.")
    if "function" not in found:
        inner = {word: value for word, value in found.items() if word not in ("type", "inputSchema")}
        if "inputSchema" in found:
            inner["parameters"] = found["inputSchema"]
        found = {"type": "function", "function": inner}
    function = found["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"The schema of the tool '{tool}' has no function name: use tapo_jax.tools.function_schema.")
    if function["name"] != tool:
        raise UserError(
            f"The tool '{tool}' has a schema named '{function['name']}': the policy would call it by the schema's name."
        )
    parameters = function["parameters"] = _given(function.get("parameters"), {})
    if not isinstance(parameters, dict) or parameters.setdefault("type", "object") != "object":
        raise UserError(f"The parameters of the tool '{tool}' are no JSON schema of type object.")
    parameters["properties"] = _given(parameters.get("properties"), {})
    parameters["required"] = _given(parameters.get("required"), [])
    return found


def _check_references(part: Any, parameters: Mapping[str, Any], tool: str) -> None:
    """Check every reference. Raises UserError for one that points outside the schema or to nothing."""
    if isinstance(part, list):
        for inner in part:
            _check_references(inner, parameters, tool)
    if not isinstance(part, dict):
        return
    reference = part.get("$ref")
    if isinstance(reference, str) and _target(reference, parameters) is None:
        raise UserError(f"The schema of the tool '{tool}' refers to {reference!r}, which it does not hold.")
    for inner in part.values():
        _check_references(inner, parameters, tool)


def _target(reference: Any, parameters: Mapping[str, Any]) -> Any:
    """Return the target of a reference like "#/$defs/Box"; None if it has none."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = parameters
    for word in reference[1:].split("/")[1:]:
        word = word.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or word not in found:
            return None
        found = found[word]
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _given(value: Any, other: Any) -> Any:
    return other if value is None else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
