"""The entries of a tar file, plain or gzipped, read once from front to end. Formats: POSIX.1-2001 pax, ustar, GNU long names.

The headers are walked here rather than by `tarfile`, which takes a long name or a pax record of any declared size into
memory, and keeps every header; its `TarInfo.frombuf` reads a single one. A webdataset shard is such a file.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from core.data.pictures.entry import Entry, EntryKind, broken
from core.errors import Problem, Unparsable

_BLOCK = 512
_CHUNK = 1 << 20
_EXTRA_BYTES = 1 << 20
"""Of a long name or a pax record, which describe one entry."""
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_KINDS: dict[bytes, EntryKind] = {
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "link",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}


def is_header(head: bytes) -> bool:
    """Whether 512 bytes begin a tar file."""
    try:
        tarfile.TarInfo.frombuf(head[:_BLOCK], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def entries(path: Path, *, is_gzip: bool, most_bytes: int) -> Iterator[Entry]:
    """Every entry in order. Raises Unparsable when the file is broken, cut off or makes more than `most_bytes`."""
    with path.open("rb") as file, gzip.GzipFile(fileobj=file) if is_gzip else file as opened:
        stream = _Stream(opened, most_bytes)  # type: ignore[arg-type]
        name: str | None = None
        size: int | None = None
        while (info := _header(stream)) is not None:
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                extra = _extra(stream, info)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = extra.partition(b"\0")[0].decode("utf-8", "surrogateescape")
                else:
                    records = _pax_records(extra)
                    name = records.get("path", name)
                    size = _pax_size(records, size)
                continue
            if info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                _extra(stream, info)
                continue
            kind: EntryKind = "file" if info.type in _FILES else _KINDS.get(info.type, "device")
            # What is no file has no bytes behind its header, whatever size that names; a sparse file's follow it.
            length = (info.size if size is None else size) if kind in ("file", "sparse file") else 0
            begin = stream.position
            yield Entry(name or info.name, kind, length, None, partial(stream.take, length))
            stream.skip(begin + length + -length % _BLOCK - stream.position)
            name = size = None
        stream.drain()


class _Stream:
    """Reads on, counting. Raises Unparsable when there is no more, or was too much."""

    def __init__(self, file: BinaryIO, most_bytes: int) -> None:
        self._file = file
        self._most = most_bytes
        self.position = 0

    def take(self, length: int) -> bytes:
        data = self.some(length)
        if len(data) < length:
            raise broken(f"it ends at byte {self.position} inside a member; it was cut off")
        return data

    def some(self, length: int) -> bytes:
        """Up to `length` bytes, fewer at the end."""
        pieces = []
        while length:
            try:
                piece = self._file.read(min(length, _CHUNK))
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise broken(f"{error} at unpacked byte {self.position}") from None
            if not piece:
                break
            self.position += len(piece)
            if self.position > self._most + _CHUNK:  # headers and padding on top of what members may have
                message = f"the archive unpacks to more than {self._most} bytes, which is the limit for its size"
                raise Unparsable(message, [Problem("archive-expands-too-far", message)])
            length -= len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def skip(self, length: int) -> None:
        while length:
            length -= len(self.take(min(length, _CHUNK)))

    def drain(self) -> None:
        """Read what is left: only at its end does a gzip file tell whether all of it was right."""
        while self.some(_CHUNK):
            pass


def _header(stream: _Stream) -> tarfile.TarInfo | None:
    """The next header; None at the end, which is a block of zeros or, as some writers leave it, nothing."""
    block = stream.some(_BLOCK)
    if not block or not block.strip(b"\0"):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise broken(f"no tar header at byte {stream.position - len(block)} ({error})") from None
    if info.size < 0:
        raise broken(f"a member of {info.size} bytes at byte {stream.position - len(block)}")
    return info


def _extra(stream: _Stream, info: tarfile.TarInfo) -> bytes:
    if info.size > _EXTRA_BYTES:
        raise broken(f"a name or record of {info.size} bytes at byte {stream.position}")
    return stream.take(info.size + -info.size % _BLOCK)[: info.size]


def _pax_records(data: bytes) -> dict[str, str]:
    """Records of the form `length key=value\\n`, the length counting itself."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at : at + 1] != b"\0":
        digits, space, _ = data[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[at + len(digits) + 1 : at + length]
        if not space or not record.endswith(b"\n") or at + length > len(data):
            raise broken("a pax record that can't be read")
        key, _, value = record[:-1].decode("utf-8", "surrogateescape").partition("=")
        records[key] = value
        at += length
    return records


def _pax_size(records: dict[str, str], before: int | None) -> int | None:
    if "GNU.sparse.major" in records or "GNU.sparse.size" in records:
        raise broken("a sparse file; pack it as an ordinary one")
    given = records.get("size")
    if given is None:
        return before
    if not (given.isascii() and given.isdigit() and len(given) < 20):
        raise broken(f"a member of {given[:40]!r} bytes")
    return int(given)
