"""JSON as RFC 8259 means it, on top of the standard library's scanner, which accepts more and recurses without a guard.

Used by the reader alone. Syntax errors are raised; values that a database or a tokenizer would choke on (NaN, duplicate
keys, endless digits) are gathered in `faults`, so that one row of an array can be refused and the next one read.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64
MAX_DIGITS = 400
_FAULTS = 20

# Whole strings are matched so that brackets inside them don't count. Possessive, and an unclosed string runs to the end:
# no input makes this worse than linear.
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\(?:.|\Z)[^"\\]*+)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)
_BAD_TEXT = re.compile("[\x00\ud800-\udfff]")


class StrictJson:
    """A decoder of single values; `faults` says what was wrong with the last one."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int, parse_float=self._float
        )

    def decode(self, text: str, at: int) -> tuple[Any, int]:
        """(value, index behind it) of the value that begins at `at`. Raises json.JSONDecodeError.

        The caller has asked `first_too_deep` before: deeper text would be a RecursionError.
        """
        self.faults.clear()
        return self._decoder.raw_decode(text, at)

    def _fault(self, reason: str) -> None:
        if len(self.faults) < _FAULTS:
            self.faults.append(reason)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._fault(f"key {shown(key)} twice in one object")
                seen.add(key)
        return value

    def _constant(self, name: str) -> None:
        self._fault(f"{name} is not a JSON value")

    def _int(self, digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            self._fault(f"a number of {len(digits)} digits")
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        value = float(digits) if len(digits) <= MAX_DIGITS else float("inf")
        if value in (float("inf"), float("-inf")):
            self._fault(f"the number {digits[:20]} is out of range")
        return value


def first_too_deep(text: str) -> int | None:
    """Index of the first bracket nested deeper than MAX_DEPTH, or None."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return None
    depth = 0
    for match in _STRUCTURE.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return match.start()
        elif token in "]}":
            depth -= 1
    return None


def text_faults(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """(field path, reason) of every string that holds what PostgreSQL or UTF-8 has no place for."""
    if isinstance(value, str):
        if match := _BAD_TEXT.search(value):
            kind = "a NUL character" if match[0] == "\x00" else "a lone surrogate"
            yield field, f"{kind} at character {match.start()}"
    elif isinstance(value, dict):
        for key, item in value.items():
            path = f"{field}.{plain(key)}" if field else plain(key)
            for _, reason in text_faults(key):
                yield path, f"{reason} of the key"
            yield from text_faults(item, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from text_faults(item, f"{field}[{index}]")


def plain(text: str) -> str:
    """A piece of a user's text fit for a report: short, and without what a database would refuse."""
    return _BAD_TEXT.sub("\N{REPLACEMENT CHARACTER}", text[:60])


def shown(value: Any) -> str:
    """The same in quotes, for a message."""
    text = value if isinstance(value, str) else str(value)
    return json.dumps(plain(text) + ("…" if len(text) > 60 else ""), ensure_ascii=False)
