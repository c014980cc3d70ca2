"""What a format is. The four of them are in the files beside this one; `FORMATS` in the package lists them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.data.conversation import Message

Parse = Callable[[dict[str, Any]], list[Message]]


@dataclass(frozen=True)
class Format:
    """A way to write a conversation as one row.

    `required` tells the format: a row that has these fields is of it. `items`, where set, is the field that holds a list
    of objects, and `item_fields` what these may hold. `parse` raises InvalidInput with every problem of the row, each
    with its field path.
    """

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    parse: Parse
    items: str | None = None
    item_fields: frozenset[str] = frozenset()

    def matches(self, row: Mapping[str, Any]) -> bool:
        return self.required <= row.keys()

    def unknown_fields(self, row: Mapping[str, Any]) -> set[str]:
        """Fields of a row that the format does not read, those of its items as `messages[].name`."""
        unknown = set(row.keys() - self.required - self.optional)
        items = row.get(self.items) if self.items else None
        if isinstance(items, list):
            for item in items:
                if isinstance(item, dict):
                    unknown.update(f"{self.items}[].{name}" for name in item.keys() - self.item_fields)
        return unknown
