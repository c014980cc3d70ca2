"""An uploaded archive as a stream of members: zip, tar or tar.gz, told apart by content. Nothing is extracted to disk.

First stop of a picture dataset's walk. Members are read one after another and held whole, one at a time. An archive is
hostile until shown otherwise: what a header says of sizes is the sender's word, so bytes are counted as they are made, and
names are only ever compared, never opened. What spoils one member goes to the findings, each naming the member, and the
next one is read; what spoils the archive is raised.

Codes. Archive: archive-not-supported, broken-archive, too-many-members, archive-expands-too-far. Member:
unsafe-archive-member, encrypted-member, nested-archive, member-too-large, duplicate-member, broken-member.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from zipfile import BadZipFile

from core.data.findings import Findings
from core.data.pictures import tarred, zipped
from core.data.pictures.entry import Entry, broken
from core.data.strict_json import shown
from core.errors import Problem, Unparsable

ArchiveKind = Literal["zip", "tar", "tar.gz"]


@dataclass(frozen=True)
class Limits:
    members: int = 200_000
    """Entries of every sort, folders and such too."""
    member_bytes: int = 128 << 20
    total_bytes: int = 64 << 30
    """Of all members together, unpacked."""
    ratio: int = 100
    """Unpacked over packed bytes, of a member and of the whole."""
    ratio_from: int = 1 << 20
    """Unpacked bytes below which no ratio is asked for: a small text may well repeat itself."""


LIMITS = Limits()


class Member(NamedTuple):
    """A sound member. `name` has `/` between its parts, none of them empty, `.` or `..`."""

    name: str
    data: bytes


_HEAD_BYTES = 512
_NAME_BYTES = 1024
_DRIVE = re.compile(r"[A-Za-z]:")
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_READ: dict[str, ArchiveKind] = {"zip": "zip", "tar": "tar", "gzip": "tar.gz"}
_OTHER_KINDS = {
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
}
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_CLUTTER = re.compile(r"(^|/)(__MACOSX/|\._[^/]*\Z|\.DS_Store\Z|Thumbs\.db\Z|desktop\.ini\Z)")
"""What operating systems put beside people's files."""


def archive_kind(path: Path) -> ArchiveKind | None:
    """What kind of archive a file is, by its first bytes; None for another file. Raises Unparsable for a kind not read here."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    kind = _kind_of(head)
    if kind is None:
        return None
    if kind not in _READ:
        message = f"a {kind} archive; pack the files as zip, tar or tar.gz"
        raise Unparsable(message, [Problem("archive-not-supported", message)])
    return _READ[kind]


def is_archive(path: Path) -> bool:
    """Whether a file is an archive of any kind, also of those that `read_archive` refuses."""
    with path.open("rb") as file:
        return _kind_of(file.read(_HEAD_BYTES)) is not None


def read_archive(path: Path, findings: Findings, limits: Limits = LIMITS) -> Iterator[Member]:
    """Every sound member of an archive, in its order. `findings` gets the others.

    Raises Unparsable where the archive can't be read on: it is broken, holds too many members or unpacks to too much.
    """
    kind = archive_kind(path)
    packed = path.stat().st_size
    most = min(limits.total_bytes, max(limits.ratio_from, limits.ratio * packed))
    if kind == "zip":
        entries = zipped.entries(path, limits.members)
    elif kind is not None:
        entries = tarred.entries(path, is_gzip=kind == "tar.gz", most_bytes=most)
    else:
        raise broken("neither a zip nor a tar file")
    seen: set[str] = set()
    produced = 0
    for count, entry in enumerate(entries, 1):
        if count > limits.members:
            message = f"more than {limits.members} members; split the dataset"
            raise Unparsable(message, [Problem("too-many-members", message)])
        produced += entry.size
        if produced > most:
            raise _expands_too_far(entry.name, most)
        name = _normal(entry.name)
        if entry.kind == "folder" or _CLUTTER.search(name):
            continue
        faults = list(_faults(entry, name, seen, limits))
        seen.add(name)
        data = b"" if faults else _read(entry, faults)
        for code, reason in faults:
            findings.refuse(Problem(code, f"{shown(entry.name)}: {reason}"))
        if not faults:
            yield Member(name, data)


def _expands_too_far(name: str, most: int) -> Unparsable:
    message = f"{shown(name)}: with it the archive unpacks to more than {most} bytes, which is the limit for its size"
    return Unparsable(message, [Problem("archive-expands-too-far", message)])


def _read(entry: Entry, faults: list[tuple[str, str]]) -> bytes:
    try:
        data = entry.read()
    except (BadZipFile, EOFError, zlib.error, ValueError) as error:
        faults.append(("broken-member", str(error) or type(error).__name__))
        return b""
    if len(data) != entry.size:
        faults.append(("broken-member", f"holds {len(data)} bytes and says {entry.size}"))
    kind = _kind_of(data[:_HEAD_BYTES])
    if kind is not None:
        faults.append(("nested-archive", f"a {kind} file inside the archive; put its files there instead"))
    return data


def _faults(entry: Entry, name: str, seen: set[str], limits: Limits) -> Iterator[tuple[str, str]]:
    """(code, reason) of everything that forbids to read an entry."""
    raw = entry.name
    unsafe = (
        (raw.startswith("/") or bool(_DRIVE.match(raw)), "an absolute name; names must be relative"),
        (".." in re.split(r"[/\\]", raw), "the name leaves the archive's folder (..)"),
        ("\\" in raw, "a backslash in the name; write / between folders"),
        (bool(_CONTROL.search(raw)), "a control character, or what is not UTF-8, in the name"),
        (not name, "an empty name"),
        (len(raw.encode(errors="replace")) > _NAME_BYTES, f"a name of more than {_NAME_BYTES} bytes"),
        (entry.kind not in ("file", "encrypted"), f"a {entry.kind}; only files may stand in a dataset"),
    )
    yield from (("unsafe-archive-member", reason) for is_unsafe, reason in unsafe if is_unsafe)
    if entry.kind == "encrypted":
        yield "encrypted-member", "the member is encrypted; pack it without a password"
    if name in seen:
        yield "duplicate-member", "the name stands twice in the archive"
    if entry.size > limits.member_bytes:
        yield "member-too-large", f"{entry.size} bytes; a member may have {limits.member_bytes}"
    elif entry.packed is not None and entry.size > max(limits.ratio_from, limits.ratio * entry.packed):
        yield "archive-expands-too-far", f"{entry.packed} bytes unpack to {entry.size}, more than {limits.ratio} times as many"


def _normal(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _kind_of(head: bytes) -> str | None:
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if _BZIP2.match(head):
        return "bzip2"
    if tarred.is_header(head):
        return "tar"
    return next((kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic)), None)
