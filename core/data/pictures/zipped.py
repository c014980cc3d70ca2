"""The entries of a zip file. Format: PKWARE's APPNOTE.TXT 6.3 (central directory, 4.3.12; end records, 4.3.14 to 4.3.16).

The standard library reads the central directory whole and makes an object of every entry before anyone could object, so the
number of entries is bounded here first. It inflates no more than an entry's declared size, and checks its CRC-32.
"""

import stat
import struct
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from core.data.pictures.entry import Entry, EntryKind, broken

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END_MARK, _LOCATOR_MARK, _END64_MARK, _ENTRY_MARK = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06", b"PK\x01\x02"
_LONGEST_COMMENT = 65_535
_ENTRY_BYTES = 2048
"""Of the central directory, for each entry allowed: 46 and its name, extra field and comment."""
_ENCRYPTED = 0x1
_UTF8_NAME = 0x800
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def entries(path: Path, most: int) -> Iterator[Entry]:
    """Every entry by the central directory. Raises Unparsable when there is none, or it holds far more than `most`."""
    with path.open("rb") as file:
        _bound_directory(file, path.stat().st_size, most)
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
            raise broken(str(error)) from None
        with archive:
            for info in archive.infolist():
                yield Entry(_name(info), _kind(info), info.file_size, info.compress_size, partial(_read, archive, info))


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Raises what the standard library raises for a broken member, RuntimeError and its kind as ValueError."""
    if info.compress_type not in _METHODS:
        raise ValueError(f"compression method {info.compress_type}; use store or deflate")
    if info.header_offset < 0:
        raise ValueError("it begins before the file does")
    try:
        with archive.open(info) as member:
            return member.read(info.file_size + 1)
    except (RuntimeError, struct.error, IndexError) as error:
        raise ValueError(str(error)) from None


def _name(info: zipfile.ZipInfo) -> str:
    """The name whole, NULs too. Many programs write UTF-8 without saying so, which the library reads as code page 437."""
    name = info.orig_filename
    if info.flag_bits & _UTF8_NAME:
        return name
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _kind(info: zipfile.ZipInfo) -> EntryKind:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "device"
    if info.flag_bits & _ENCRYPTED:
        return "encrypted"
    return "folder" if info.orig_filename.endswith("/") and not info.file_size else "file"


def _bound_directory(file: BinaryIO, size: int, most: int) -> None:
    """Raises Unparsable for a central directory that would take memory out of measure, whatever its end record says."""
    tail_bytes = min(size, _END.size + _LONGEST_COMMENT)
    file.seek(size - tail_bytes)
    tail = file.read(tail_bytes)
    at = tail.rfind(_END_MARK)
    if at < 0 or len(tail) - at < _END.size:
        raise broken("a zip file without its end record; it was cut off")
    directory_bytes = _END.unpack_from(tail, at)[5]
    end = size - tail_bytes + at
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size :].startswith(_LOCATOR_MARK):
        # The library looks for the record right before its locator, too.
        file.seek(max(0, end - _LOCATOR.size - _END64.size))
        record = file.read(_END64.size)
        if len(record) == _END64.size and record.startswith(_END64_MARK):
            directory_bytes = _END64.unpack(record)[8]
            end -= _LOCATOR.size + _END64.size
    if directory_bytes > min(end, most * _ENTRY_BYTES):
        raise broken(f"a zip directory of {directory_bytes} bytes")
    file.seek(end - directory_bytes)
    found, left, carried = 0, directory_bytes, b""
    while left:
        chunk = file.read(min(left, 1 << 20))
        if not chunk:
            break
        left -= len(chunk)
        window = carried + chunk
        found += window.count(_ENTRY_MARK)
        carried = window[-(len(_ENTRY_MARK) - 1) :]
    if found > most:
        raise broken(f"a zip directory of more than {most} entries; split the dataset")
    file.seek(0)
