"""An upload judged: what format it has, which rows can be used, what is wrong with the others.

Second stop of a dataset's walk, between the reader and rows.jsonl. The format is that of the first row that has one; no
row is guessed at singly. The rows of an archive of pictures come before the same judge, by `pictures.validate`.

Codes beside the reader's. File errors: empty-dataset, unknown-format. Row errors: unknown-format, mixed-format,
top-level-object, missing-field, wrong-type, bad-role, bad-roles, bad-weight, empty-target, empty-prompt, too-many-turns,
equal-preference, prompts-differ, tools-not-supported, media-not-supported, preference-not-supported.
Warnings: utf8-bom, unknown-field, duplicate-row, duplicate-id, ends-with-user, no-weight, long-row.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.data.conversation import Message, Parsed, PictureChat, PicturePair, PictureQuestion, PlainText, Preference
from core.data.findings import KEPT_PROBLEMS, Findings
from core.data.formats import FORMATS, Format
from core.data.reader import Row, open_rows
from core.data.strict_json import plain, shown
from core.errors import InvalidInput, Problem, Unparsable
from core.records import DatasetReport

__all__ = ["KEPT_PROBLEMS", "LONG_ROW_CHARACTERS", "Judge", "validate"]

LONG_ROW_CHARACTERS = 200_000
_NAMED_FIELDS = 20
_MEDIA = ("media-not-supported", "video and audio can't be trained on yet")
_PICTURE = ("media-not-supported", "a picture in a row of text; upload the file together with its pictures, as zip or tar")
_PREFERENCE = ("preference-not-supported", "an answer to prefer or to refuse, in a row that is of no known preference format")
_PREFERENCE_FIELDS = ("chosen", "rejected", "preferred_output", "non_preferred_output", "rejected_response", "rejected_messages")
_PICTURE_FIELDS = ("image", "images")
_REFUSED_FIELDS = {
    **dict.fromkeys(_PICTURE_FIELDS, _PICTURE),
    **dict.fromkeys(("video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(_PREFERENCE_FIELDS, _PREFERENCE),
}
"""Fields that make a row another kind of example: read without them it would teach something else than was meant."""
_MEDIA_FILE = re.compile(r"\.(jpe?g|png|gif|webp|bmp|tiff?|mp4|mov|webm|wav|mp3|flac|ogg)\Z", re.IGNORECASE)


def validate(upload: Path, filename: str, keep: Callable[[int, Parsed], None]) -> DatasetReport:
    """Read a whole upload, call `keep(row number, row)` for every usable row, and report.

    Never raises for what stands in the file: a file that can't be read has its reason in the report and 0 usable rows.
    """
    judge = Judge(keep)
    try:
        file = open_rows(upload, filename)
        if file.has_bom:
            judge.findings.warn(Problem("utf8-bom", "the file begins with a byte order mark, which was dropped", line=1))
        judge.read(file.rows)
    except Unparsable as error:
        return judge.report(broken_by=error.problems)
    return judge.report()


@dataclass
class Judge:
    """Reads rows, calls `keep` for those that can be used, and reports. `formats` are those a row may have, in this order."""

    keep: Callable[[int, Parsed], None]
    formats: Mapping[str, Format] = field(default_factory=lambda: FORMATS)
    findings: Findings = field(default_factory=Findings)
    format: Format | None = None
    has_pictures: bool = False
    """The rows come with pictures, so that a row may name some."""
    rows: int = 0
    usable: int = 0
    turns: int = 0
    characters: int = 0
    duplicates: int = 0
    format_row: int = 0
    unknown_fields: set[str] = field(default_factory=set)
    seen_rows: dict[int, int] = field(default_factory=dict)
    seen_ids: dict[int, int] = field(default_factory=dict)

    def read(self, rows: Iterable[Row | Problem]) -> None:
        """Judge every row. Raises Unparsable where the rows can't be read on."""
        for row in rows:
            self.rows += 1
            if isinstance(row, Row):
                self.take(row)
            else:
                self.findings.refuse(row)
        if self.rows == 0:
            self.findings.refuse(Problem("empty-dataset", "the file holds no rows"))
        if self.unknown_fields:
            names = sorted(self.unknown_fields)
            more = f" and {len(names) - _NAMED_FIELDS} more" if len(names) > _NAMED_FIELDS else ""
            listed = ", ".join(names[:_NAMED_FIELDS]) + more
            self.findings.warn(Problem("unknown-field", f"not part of the format and ignored: {listed}"))

    def take(self, row: Row) -> None:
        problems, parsed = self.parse(row)
        for problem in problems:
            self.findings.refuse(replace(problem, row=row.number, line=row.line))
        if problems or parsed is None:
            return
        turns, length = _size(parsed)
        self.usable += 1
        self.turns += turns
        self.characters += length
        self.look_at(row, parsed, length)
        self.keep(row.number, parsed)

    def parse(self, row: Row) -> tuple[list[Problem], Parsed | None]:
        found = next((known for known in self.formats.values() if known.matches(row.value)), None)
        if self.format is None:
            self.format, self.format_row = found, row.number
        problems = self.refusals(row.value, found)
        if self.format is None:
            return problems or [self.no_format(row)], None
        if found is not self.format:
            return [*problems, self.misfit(row, found)], None
        if len(self.unknown_fields) < 10 * _NAMED_FIELDS:
            self.unknown_fields |= {plain(name) for name in self.format.unknown_fields(row.value)}
        try:
            parsed = self.format.parse(row.value)
        except InvalidInput as error:
            return [*problems, *error.problems], None
        return problems, parsed

    def misfit(self, row: Row, found: Format | None) -> Problem:
        assert self.format is not None
        missing = sorted(self.format.required - row.value.keys())
        # A row that lacks one field of its format may be whole in the eyes of another that asks for less.
        is_part = found is None or (missing and (self.format.required - found.required) & row.value.keys())
        if found is not None and not is_part:
            message = f"row {row.number} is {found.name}, row {self.format_row} is {self.format.name}; a file has one format"
            return Problem("mixed-format", message)
        message = f"{', '.join(missing)} missing; the file is {self.format.name} by row {self.format_row}"
        return Problem("missing-field", message, field=missing[0])

    def look_at(self, row: Row, parsed: Parsed, length: int) -> None:
        """What deserves a look in a row that can be used."""
        found: list[Problem] = []
        first = self.seen_rows.setdefault(_fingerprint(parsed), row.number)
        if first != row.number:
            self.duplicates += 1
            found.append(Problem("duplicate-row", f"the same as row {first}"))
        identity = row.value.get("id")
        if isinstance(identity, str | int) and identity != "":
            first = self.seen_ids.setdefault(_fingerprint(repr(identity)), row.number)
            if first != row.number:
                found.append(Problem("duplicate-id", f"the id {shown(identity)} is row {first}'s too", field="id"))
        turns = _turns(parsed)
        if turns and turns[-1].role == "user":
            found.append(Problem("ends-with-user", "the last message is the user's; it teaches nothing"))
        if turns and not any(message.weight for message in turns if message.role == "assistant"):
            found.append(Problem("no-weight", "every answer has weight 0; only train_on everything learns from this row"))
        if length > LONG_ROW_CHARACTERS and not isinstance(parsed, PlainText):
            found.append(Problem("long-row", f"{length} characters; it will be cut at the job's max_length"))
        for problem in found:
            self.findings.warn(replace(problem, row=row.number, line=row.line))

    def report(self, broken_by: tuple[Problem, ...] = (), pictures: int = 0) -> DatasetReport:
        """What was found. Of what is broken nothing can be used."""
        self.findings.broken_by(broken_by)
        is_whole = not broken_by
        return DatasetReport(
            format=self.format.name if self.format else None,
            kind=self.format.kind if self.format else None,
            rows=self.rows,
            usable_rows=is_whole * self.usable,
            turns=is_whole * self.turns,
            characters=is_whole * self.characters,
            duplicate_rows=is_whole * self.duplicates,
            pictures=is_whole * pictures,
            error_count=self.findings.error_count,
            warning_count=self.findings.warning_count,
            errors=self.findings.errors,
            warnings=self.findings.warnings,
        )

    def no_format(self, row: Row) -> Problem:
        rows = row.value.items()
        wrapped = [name for name, value in rows if isinstance(value, list) and value and isinstance(value[0], dict)]
        if wrapped and row.number == 1:
            return Problem("top-level-object", f"the rows seem to stand under {shown(wrapped[0])}: upload that array alone")
        names = ", ".join(plain(name) for name in list(row.value)[:10])
        wanted = "; ".join(f"{known.name}: {', '.join(sorted(known.required))}" for known in self.formats.values())
        return Problem("unknown-format", f"the fields ({names}) are of no known format ({wanted})")

    def refusals(self, row: dict[str, Any], found: Format | None) -> list[Problem]:
        known = {name for shape in (found, self.format) if shape for name in shape.required}
        if self.has_pictures:
            known |= {*_PICTURE_FIELDS}
        refused = {name: why for name, why in _REFUSED_FIELDS.items() if row.get(name) and name not in known}
        name = row.get("file_name")  # a list of captions looks like texts with a name each
        if not self.has_pictures and isinstance(name, str) and _MEDIA_FILE.search(name):
            refused["file_name"] = _PICTURE
        return [Problem(code, message, field=name) for name, (code, message) in refused.items()]


def _size(parsed: Parsed) -> tuple[int, int]:
    """(messages, characters)."""
    if isinstance(parsed, PlainText):
        return 0, len(parsed.text)
    if isinstance(parsed, PicturePair):
        return 0, sum(map(len, parsed.captions))
    if isinstance(parsed, PictureQuestion):
        return 0, len(parsed.question) + sum(map(len, parsed.answers))
    messages = [*parsed.prompt, parsed.chosen, parsed.rejected] if isinstance(parsed, Preference) else _turns(parsed)
    return len(messages), sum(len(message.content) for message in messages)


def _turns(parsed: Parsed) -> list[Message]:
    """The messages of a conversation, with pictures or without; of another row none."""
    if isinstance(parsed, PictureChat):
        return parsed.messages
    return parsed if isinstance(parsed, list) else []


def _fingerprint(content: object) -> int:
    """64 bits: a chance hit among a million rows has odds of 1 in 30 million, and costs one wrong warning."""
    text = repr(content) if not isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
