"""Receive one file of a multipart form straight onto the disk: hashed on the way, never whole in memory, gone on any failure.

FastAPI's own `UploadFile` would spool the body before the route runs, to the system's temporary folder and without a cap.
"""

import asyncio
import errno
import hashlib
import os
import tempfile
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from core.errors import InvalidInput, Problem, TooLarge, Unavailable, Unparsable

FILE_FIELD = "file"
NAME_FIELD = "name"

_IDLE_SECONDS = 60.0
_BUFFER = 1 << 20
_NAME_BYTES = 1024
_PARTS = 8


@dataclass(frozen=True)
class Upload:
    """A received file. Whoever takes it moves `path` away; else it is removed."""

    path: Path
    filename: str
    name: str | None
    size: int
    sha256: str


@asynccontextmanager
async def receive_file(request: Request, folder: Path, *, max_bytes: int) -> AsyncIterator[Upload]:
    """Read a multipart/form-data body with exactly one `file` and perhaps a `name` into `folder`.

    Raises Unparsable, InvalidInput (no file, two files, an empty one, a bad name: all at once), TooLarge, Unavailable when the
    disk is full, and starlette's ClientDisconnect. The file is removed when the block ends, unless it was moved away.
    """
    boundary = _boundary(request)
    handle, name = tempfile.mkstemp(dir=folder, prefix="upload-")  # 0600
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            form = _Form(file, max_bytes)
            await _feed(request, form.parser(boundary), form)
        form.check()
        yield Upload(path, _filename(form.filename), form.name, form.size, form.digest.hexdigest())
    finally:
        path.unlink(missing_ok=True)


@dataclass
class _Form:
    """What the parser's callbacks have seen. Bytes of the file gather in `pending` until they are worth a write."""

    sink: BinaryIO
    max_bytes: int
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    pending: bytearray = field(default_factory=bytearray)
    size: int = 0
    filename: str | None = None
    files: int = 0
    parts: int = 0
    unknown: list[str] = field(default_factory=list)
    is_complete: bool = False
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _field: str | None = None
    _name: bytearray | None = None

    @property
    def name(self) -> str | None:
        return None if self._name is None else self._name.decode("utf-8").strip()

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_end": self._end,
            },
        )

    def flush(self) -> None:
        """Hash and write what is pending; slow enough to belong in a thread."""
        self.digest.update(self.pending)
        self.sink.write(self.pending)
        self.pending.clear()

    def check(self) -> None:
        """Raises InvalidInput with everything that is wrong with the form."""
        problems = []
        if not self.is_complete:
            raise Unparsable("The multipart body ends before its closing boundary")
        if self.files == 0:
            problems.append(Problem("missing-file", f"the form has no file field `{FILE_FIELD}`", field=FILE_FIELD))
        elif self.files > 1:
            problems.append(Problem("several-files", f"one file per dataset, not {self.files}", field=FILE_FIELD))
        elif self.size == 0:
            problems.append(Problem("empty-file", "the file has no bytes", field=FILE_FIELD))
        problems += [Problem("unknown-field", "there is no such form field", field=name) for name in self.unknown]
        try:
            name = self.name
        except UnicodeDecodeError:
            name = None
            problems.append(Problem("bad-name", "must be UTF-8", field=NAME_FIELD))
        if name is not None and not (1 <= len(name) <= 128 and name.isprintable()):
            problems.append(Problem("bad-name", "must be 1 to 128 printable characters", field=NAME_FIELD))
        if problems:
            raise InvalidInput("The form is not a dataset", problems)

    def _part_begin(self) -> None:
        self.parts += 1
        if self.parts > _PARTS:
            raise Unparsable(f"The form has more than {_PARTS} parts")
        self._headers = {}

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._field = name
        if name == FILE_FIELD:
            self.files += 1
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif name == NAME_FIELD and self._name is None:
            self._name = bytearray()
        else:
            self.unknown.append(name[:64])

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == FILE_FIELD and self.files == 1:
            self.size += end - start
            if self.size > self.max_bytes:
                raise TooLarge(f"A dataset file has at most {self.max_bytes} bytes")
            self.pending += memoryview(data)[start:end]
        elif self._field == NAME_FIELD and self._name is not None:
            self._name += memoryview(data)[start:end]
            if len(self._name) > _NAME_BYTES:
                raise TooLarge(f"The form field `{NAME_FIELD}` has at most {_NAME_BYTES} bytes")

    def _end(self) -> None:
        self.is_complete = True


def _boundary(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "Send the file as it is, without Content-Encoding")
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise HTTPException(415, "Send the file as multipart/form-data")
    boundary = options.get(b"boundary")
    if not boundary:
        raise Unparsable("The multipart Content-Type names no boundary")
    return boundary


async def _feed(request: Request, parser: MultipartParser, form: _Form) -> None:
    chunks = request.stream().__aiter__()
    try:
        while True:
            try:
                async with asyncio.timeout(_IDLE_SECONDS):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise HTTPException(408, f"Nothing arrived for {_IDLE_SECONDS:.0f} seconds") from None
            if chunk:
                parser.write(chunk)
            if len(form.pending) >= _BUFFER:
                await run_in_threadpool(form.flush)
        await run_in_threadpool(form.flush)
    except FormParserError as error:
        raise Unparsable(f"The multipart body can't be read: {error}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unavailable("There is no room left for uploads") from None


def _filename(given: str | None) -> str:
    """The name as text, never used as a path: its last part, without control and direction marks."""
    last = (given or "").replace("\\", "/").rpartition("/")[2]
    shown = "".join(letter for letter in last if unicodedata.category(letter)[0] != "C")
    return shown.strip()[:255] or "upload"
