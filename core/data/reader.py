"""An uploaded file as a stream of rows: JSON array, JSON Lines or CSV, told apart by content.

First stop of a dataset's walk: reader -> formats -> validate -> rows.jsonl. It knows nothing of formats or messages.
Parsing is strict, because what a lenient parser lets through (NaN, a duplicate key, a lone surrogate) fails later, in
the database or on the GPU. What spoils one row comes out as a Problem in its place; what spoils the file is raised.

Memory: JSON Lines and CSV hold one line of at most LINE_BYTES (and one CSV record); a JSON array is held whole and may
have at most ARRAY_BYTES, its rows are still made one at a time.

Codes. File: not-utf8, invalid-json, invalid-json-value, top-level-object, file-too-large, line-too-long, invalid-csv,
duplicate-column, unclosed-quote. Row: invalid-json, invalid-json-value, not-an-object, line-too-long, ragged-row,
invalid-csv, invalid-text.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from core.data.strict_json import MAX_DEPTH, StrictJson, first_too_deep, text_faults
from core.errors import Problem, Unparsable

LINE_BYTES = 8 << 20
ARRAY_BYTES = 128 << 20
_BOM = b"\xef\xbb\xbf"
_WHITESPACE = b" \t\r\n"
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_JSON_NAMES = (".json", ".jsonl", ".ndjson")
_HEAD_BYTES = 64 << 10


@dataclass(frozen=True)
class Row:
    """One parsed row. `number` counts from 1, `line` is the file's line it begins on."""

    number: int
    line: int | None
    value: dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """An opened upload. `rows` reads on as it is consumed and raises Unparsable where the whole file is spoilt."""

    kind: Literal["json", "jsonl", "csv", "empty"]
    has_bom: bool
    rows: Iterator[Row | Problem]


def open_rows(path: Path, filename: str) -> RowFile:
    """Tell what a file holds and return its rows. Raises Unparsable with the one Problem that stops it.

    Content decides: `[` begins a JSON array, `{` JSON Lines. Only where neither stands first does the name count: a
    JSON name means JSON Lines whose first line is broken, anything else CSV.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        _refuse_wide_encoding(head)
        start = len(_BOM) if head.startswith(_BOM) else 0
        first = _first_byte(file, start)
    has_bom = start > 0
    if first is None:
        return RowFile("empty", has_bom, iter(()))
    if first == b"[":
        return RowFile("json", has_bom, _array_rows(path, start))
    if first == b"{":
        _refuse_single_object(path, start)
        return RowFile("jsonl", has_bom, _line_rows(path, start))
    if filename.lower().endswith(_JSON_NAMES):
        return RowFile("jsonl", has_bom, _line_rows(path, start))
    return RowFile("csv", has_bom, _csv_rows(path, start))


def _refuse_wide_encoding(head: bytes) -> None:
    """UTF-16 and UTF-32 of ASCII are valid UTF-8 full of NULs, so they are told by their marks before decoding."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")) or b"\x00" in head[:2]:
        message = "byte 0: the file is UTF-16 or UTF-32; save it as UTF-8"
        raise Unparsable(message, [Problem("not-utf8", message, line=1)])


def _first_byte(file: BinaryIO, start: int) -> bytes | None:
    file.seek(start)
    while chunk := file.read(_HEAD_BYTES):
        if rest := chunk.lstrip(_WHITESPACE):
            return rest[:1]
    return None


def _refuse_single_object(path: Path, start: int) -> None:
    """A file that is one object over several lines is no JSON Lines, though every line of it would be reported so."""
    if path.stat().st_size > LINE_BYTES:
        return
    with path.open("rb") as file:
        file.seek(start)
        raw = file.read()
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return  # the line reader comes to that place, and says what stood before it
    if "\n" not in text or first_too_deep(text) is not None:
        return
    strict = StrictJson()
    try:
        _, end = strict.decode(text, 0)
    except json.JSONDecodeError:
        return
    if end == len(text):
        message = "the file is one JSON object; it must be an array of objects, or one object on each line"
        raise Unparsable(message, [Problem("top-level-object", message, line=1, row=None)])


def _array_rows(path: Path, start: int) -> Iterator[Row | Problem]:
    size = path.stat().st_size
    if size > ARRAY_BYTES:
        message = f"a JSON array may have {ARRAY_BYTES >> 20} MiB, this one has {size >> 20}; JSON Lines has no such limit"
        raise Unparsable(message, [Problem("file-too-large", message)])
    with path.open("rb") as file:
        file.seek(start)
        text = _decode(file.read(), offset=start, line=1)
    if (deep := first_too_deep(text)) is not None:
        raise _spoilt("invalid-json-value", text, deep, f"nested deeper than {MAX_DEPTH}")
    strict = StrictJson()
    at = _skip_space(text, text.index("[") + 1)
    number, line, counted = 0, 1, 0
    if text[at : at + 1] == "]":
        _end_of_array(text, at + 1)
        return
    while True:
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = strict.decode(text, at)
        except json.JSONDecodeError as error:
            raise _spoilt("invalid-json", text, error.pos, error.msg) from None
        if end - at > LINE_BYTES:
            yield Problem("line-too-long", _too_long(), row=number, line=line)
        else:
            yield _row(number, line, value, strict.faults)
        at = _skip_space(text, end)
        if text[at : at + 1] == "]":
            _end_of_array(text, at + 1)
            return
        if text[at : at + 1] != ",":
            raise _spoilt("invalid-json", text, at, "Expecting ',' or ']' after an element")
        at = _skip_space(text, at + 1)


def _end_of_array(text: str, at: int) -> None:
    at = _skip_space(text, at)
    if at < len(text):
        raise _spoilt("invalid-json", text, at, "Extra data after the array")


def _skip_space(text: str, at: int) -> int:
    match = _JSON_SPACE.match(text, at)
    assert match is not None
    return match.end()


def _spoilt(code: str, text: str, at: int, reason: str) -> Unparsable:
    line = text.count("\n", 0, at) + 1
    message = f"line {line} column {at - text.rfind(chr(10), 0, at)}: {reason}"
    return Unparsable(message, [Problem(code, message, line=line)])


def _line_rows(path: Path, start: int) -> Iterator[Row | Problem]:
    strict = StrictJson()
    number = 0
    for line, raw in _lines(path, start):
        if raw is None:
            number += 1
            yield Problem("line-too-long", _too_long(), row=number, line=line)
            continue
        begin = _skip_space(raw, 0)
        if begin == len(raw):
            continue
        number += 1
        if first_too_deep(raw) is not None:
            yield Problem("invalid-json-value", f"nested deeper than {MAX_DEPTH}", row=number, line=line)
            continue
        try:
            value, end = strict.decode(raw, begin)
            if (end := _skip_space(raw, end)) < len(raw):
                raise json.JSONDecodeError("Extra data", raw, end)
        except json.JSONDecodeError as error:
            yield Problem("invalid-json", f"line {line} column {error.pos + 1}: {error.msg}", row=number, line=line)
            continue
        yield _row(number, line, value, strict.faults)


def _row(number: int, line: int, value: Any, faults: list[str]) -> Row | Problem:
    if faults:
        return Problem("invalid-json-value", "; ".join(faults[:5]), row=number, line=line)
    if not isinstance(value, dict):
        return Problem("not-an-object", "a row must be a JSON object", row=number, line=line)
    for field, fault in text_faults(value):
        return Problem("invalid-json-value", fault, row=number, line=line, field=field)
    return Row(number, line, value)


def _csv_rows(path: Path, start: int) -> Iterator[Row | Problem]:
    csv.field_size_limit(LINE_BYTES)
    record = _Record(path, start)
    reader = csv.reader(record, strict=True)
    header: list[str] = []
    number = 0
    while True:
        first_line = record.begin()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if record.is_exhausted or "field larger" in str(error):
                opened = record.open_quote_line()
                message = f"line {opened}: a quote opens here and is never closed"
                raise Unparsable(message, [Problem("unclosed-quote", message, line=opened)]) from None
            if not header:
                message = f"line {first_line}: {error}"
                raise Unparsable(message, [Problem("invalid-csv", message, line=first_line)]) from None
            number += 1
            yield Problem("invalid-csv", f"line {first_line}: {error}", row=number, line=first_line)
            continue
        if cells is None:
            return
        if not cells or (len(cells) == 1 and not cells[0].strip() and len(header) != 1):
            continue
        if not header:
            header = _checked_header(cells, first_line)
            continue
        number += 1
        yield _csv_row(number, first_line, header, cells)


def _checked_header(cells: list[str], line: int) -> list[str]:
    repeated = sorted({cell for cell in cells if cells.count(cell) > 1}) if len(cells) <= 1000 else []
    if repeated or len(cells) > 1000:
        reason = f"the header names {json.dumps(repeated[0][:60])} twice" if repeated else "more than 1000 columns"
        raise Unparsable(reason, [Problem("duplicate-column" if repeated else "invalid-csv", reason, line=line)])
    return cells


def _csv_row(number: int, line: int, header: list[str], cells: list[str]) -> Row | Problem:
    if len(cells) != len(header):
        message = f"{len(cells)} cells where the header has {len(header)}"
        return Problem("ragged-row", message, row=number, line=line)
    value = dict(zip(header, cells, strict=True))
    for field, fault in text_faults(value):
        return Problem("invalid-text", fault, row=number, line=line, field=field)
    return Row(number, line, value)


class _Record:
    """The lines of a CSV file for csv.reader, remembering those of the present record so that a quote can be found."""

    def __init__(self, path: Path, start: int) -> None:
        self._lines = _lines(path, start)
        self._next_line = 1
        self._present: list[tuple[int, str]] = []
        self.is_exhausted = False

    def __iter__(self) -> "_Record":
        return self

    def __next__(self) -> str:
        try:
            line, text = next(self._lines)
        except StopIteration:
            self.is_exhausted = True
            raise
        if text is None:
            message = f"line {line}: {_too_long()}"
            raise Unparsable(message, [Problem("line-too-long", message, line=line)])
        self._next_line = line + 1
        self._present.append((line, text))
        return text

    def begin(self) -> int:
        """Forget the record before; returns the line on which the next one begins."""
        self._present.clear()
        return self._next_line

    def open_quote_line(self) -> int:
        """The line of the present record's last quote that opens and does not close."""
        is_open, opened = False, self._present[0][0] if self._present else self._next_line
        for line, text in self._present:
            for _ in range(text.count('"')):
                is_open = not is_open
                opened = line if is_open else opened
        return opened


def _lines(path: Path, start: int) -> Iterator[tuple[int, str | None]]:
    """(line number from 1, text with its line end); None for a line over LINE_BYTES. Raises Unparsable not-utf8."""
    offset = start
    line = 0
    with path.open("rb") as file:
        file.seek(start)
        while raw := file.readline(LINE_BYTES + 1):
            line += 1
            is_long = len(raw) > LINE_BYTES
            if not is_long:
                yield line, _decode(raw, offset=offset, line=line)
            offset += len(raw)
            while is_long and raw and not raw.endswith(b"\n"):
                raw = file.readline(LINE_BYTES)
                offset += len(raw)
            if is_long:
                yield line, None


def _decode(raw: bytes, *, offset: int, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        message = f"line {line}, byte {offset + error.start}: not UTF-8; save the file as UTF-8"
        raise Unparsable(message, [Problem("not-utf8", message, line=line)]) from None


def _too_long() -> str:
    return f"a row may have {LINE_BYTES >> 20} MiB"
