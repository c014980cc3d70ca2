"""What a format is. Those that exist are in the files beside this one; `FORMATS` in the package lists them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.data.conversation import Parsed
from core.spec import DataKind

Parse = Callable[[dict[str, Any]], Parsed]


@dataclass(frozen=True)
class Format:
    """A way to write a conversation, a preference or a text as one row.

    `required` tells the format: a row that has these fields is of it. `nested` names what objects inside the row may hold,
    by their path: `input` is an object, `messages[]` the objects of a list, `input.messages[]` those inside another. `parse`
    gives the type that belongs to `kind`, and raises InvalidInput with every problem of the row, each with its field path.
    """

    name: str
    kind: DataKind
    required: frozenset[str]
    optional: frozenset[str]
    parse: Parse
    nested: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def matches(self, row: Mapping[str, Any]) -> bool:
        return self.required <= row.keys()

    def unknown_fields(self, row: Mapping[str, Any]) -> set[str]:
        """Fields of a row that the format does not read, those of nested objects as `messages[].name`."""
        unknown = set(row.keys() - self.required - self.optional)
        for path, known in self.nested.items():
            for item in _objects(row, path.split(".")):
                unknown.update(f"{path}.{name}" for name in item.keys() - known)
        return unknown


def _objects(value: Any, path: list[str]) -> Iterator[dict[str, Any]]:
    """The objects at a path; what is of another type there is the parser's to refuse."""
    if not path:
        if isinstance(value, dict):
            yield value
        return
    found = value.get(path[0].removesuffix("[]")) if isinstance(value, dict) else None
    is_list = path[0].endswith("[]")
    for item in found if is_list and isinstance(found, list) else [] if is_list else [found]:
        yield from _objects(item, path[1:])
