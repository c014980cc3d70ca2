"""A webdataset shard's texts: the members that share a picture's stem, as one row a picture.

A stem is a member's name up to the first dot of its last part, as webdataset cuts it. Beside a picture may stand its caption
(.txt, .cap, .caption, .text) or a row of any format without its picture's name (.json). Where both do, as img2dataset leaves
them, the caption counts: its .json tells how the picture was fetched.
"""

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from core.data.reader import Row
from core.data.strict_json import MAX_DEPTH, StrictJson, first_too_deep, shown, text_faults
from core.errors import Problem

CAPTION_EXTENSIONS = ("txt", "cap", "caption", "text")


def stem_of(name: str) -> str:
    folder, last = posixpath.split(name)
    return posixpath.join(folder, last.partition(".")[0])


def extension_of(name: str) -> str:
    return posixpath.basename(name).rpartition(".")[2].lower()


def sidecar_rows(pictures: Iterable[str], texts: Mapping[str, bytes]) -> Iterator[Row | Problem]:
    """A row for each picture, in their order and counting from 1."""
    beside: dict[str, dict[str, str]] = {}
    for name in texts:
        beside.setdefault(stem_of(name), {})[extension_of(name)] = name
    seen: dict[str, str] = {}
    for number, picture in enumerate(pictures, 1):
        stem = stem_of(picture)
        first = seen.setdefault(stem, picture)
        found = beside.get(stem, {})
        caption = next((found[extension] for extension in CAPTION_EXTENSIONS if extension in found), None)
        if first != picture:
            message = f"{shown(picture)} has the stem of {shown(first)}, so their texts can't be told apart"
            yield Problem("duplicate-stem", message, row=number)
        elif caption is not None:
            yield _caption(number, picture, caption, texts[caption])
        elif "json" in found:
            yield _json(number, picture, found["json"], texts[found["json"]])
        else:
            yield Problem("missing-caption", f"{shown(picture)} has no text beside it", row=number)


def _caption(number: int, picture: str, name: str, raw: bytes) -> Row | Problem:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem("not-utf8", f"{shown(name)}: byte {error.start} is not UTF-8", row=number)
    return _row(number, name, {"image": picture, "text": text.strip()})


def _json(number: int, picture: str, name: str, raw: bytes) -> Row | Problem:
    strict = StrictJson()
    try:
        text = raw.decode("utf-8-sig").strip()
        if first_too_deep(text) is not None:
            return Problem("invalid-json-value", f"{shown(name)}: nested deeper than {MAX_DEPTH}", row=number)
        value, end = strict.decode(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError as error:
        return Problem("not-utf8", f"{shown(name)}: byte {error.start} is not UTF-8", row=number)
    except json.JSONDecodeError as error:
        return Problem("invalid-json", f"{shown(name)}: line {error.lineno} column {error.colno}: {error.msg}", row=number)
    if strict.faults:
        return Problem("invalid-json-value", f"{shown(name)}: {'; '.join(strict.faults[:5])}", row=number)
    if not isinstance(value, dict):
        return Problem("not-an-object", f"{shown(name)}: a row must be a JSON object", row=number)
    named: dict[str, Any] = value if "images" in value else value | {"image": picture}
    return _row(number, name, named)


def _row(number: int, name: str, value: dict[str, Any]) -> Row | Problem:
    for field, fault in text_faults(value):
        return Problem("invalid-text", f"{shown(name)}: {fault}", row=number, field=field)
    return Row(number, None, value)
