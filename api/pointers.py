"""Where in a body a validation error stands, and what was probably meant.

Pydantic's places name the members of unions it tried; a JSON pointer holds only what stands in the body. A field that does
not exist is answered with the name nearest to it, or with the place where that name is known.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from core.errors import Problem

_CODES = {"extra_forbidden": "unknown-field", "missing": "missing-field"}


def schema_of(annotation: Any) -> dict[str, Any]:
    """The JSON schema of a body's type."""
    return TypeAdapter(annotation).json_schema()


def problem_of(entry: Mapping[str, Any], body: Any, schema: dict[str, Any]) -> Problem:
    """One of pydantic's errors as ours. `schema` describes the body; empty where there is none."""
    kind = entry["type"]
    code = _CODES.get(kind, kind.replace("_", "-"))
    source, *place = entry["loc"]
    message = entry["msg"].removeprefix("Value error, ")
    if source != "body":
        return Problem(code, message, field=str(place[-1]) if place else source)
    pointer = _pointer(place, body, is_missing=kind == "missing")
    if kind == "extra_forbidden":
        message = "There is no such field" + _suggestion(str(place[-1]), _members_at(schema, place[:-1]), schema)
    elif kind == "missing":
        message = "This field is required" if place else "A body is required"
    return Problem(code, message, pointer=pointer)


def _pointer(place: list[Any], body: Any, *, is_missing: bool) -> str:
    parts, current = [], body
    for number, part in enumerate(place):
        is_key = isinstance(current, dict) and part in current
        if is_key or (isinstance(current, list) and isinstance(part, int) and part < len(current)):
            current = current[part]
        elif not (is_missing and number == len(place) - 1):
            continue  # the name of a union's member
        parts.append(str(part).replace("~", "~0").replace("/", "~1"))
    return "".join("/" + part for part in parts)


def _suggestion(name: str, members: list[str], schema: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, members, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    elsewhere = sorted(path for path, leaf in _all_fields(schema, schema) if leaf == name)
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(members)}" if members else ""


def _members_at(schema: dict[str, Any], place: list[Any]) -> list[str]:
    """Names of the fields of the object at a place of pydantic's."""
    current = schema
    for part in place:
        current = _resolve(schema, current)
        if isinstance(part, str) and part in current.get("properties", {}):
            current = current["properties"][part]
        elif isinstance(part, int) and "items" in current:
            current = current["items"]
        elif part in current.get("discriminator", {}).get("mapping", {}):
            current = {"$ref": current["discriminator"]["mapping"][part]}
    return list(_resolve(schema, current).get("properties", {}))


def _all_fields(schema: dict[str, Any], current: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    current = _resolve(schema, current)
    for choice in [*current.get("oneOf", []), *current.get("anyOf", [])]:
        yield from _all_fields(schema, choice, path)
    for name, member in current.get("properties", {}).items():
        inner = f"{path}.{name}" if path else name
        yield inner, name
        yield from _all_fields(schema, member, inner)


def _resolve(schema: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    reference = current.get("$ref")
    if reference is None:
        return current
    found: dict[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
    return found
