"""Archives, sound and hostile: what is read, and the exact words for what is not."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from core.data.findings import Findings
from core.data.pictures.archive import LIMITS, Limits, Member, archive_kind, read_archive
from core.errors import Unparsable
from tests.core.data.pictures.draw import DATA, write_tar, write_zip

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the test data is not beside this checkout")
MEMBERS = [("metadata.jsonl", b'{"file_name": "d/a.png"}\n' * 40), ("d/a.png", bytes(range(256)) * 9), ("d/empty", b"")]


def read(path: Path, limits: Limits = LIMITS) -> tuple[list[Member], list[tuple[str, str]]]:
    findings = Findings()
    members = list(read_archive(path, findings, limits))
    assert findings.error_count == len(findings.errors)
    return members, [(problem.code, problem.message) for problem in findings.errors]


def refusal(path: Path, limits: Limits = LIMITS) -> tuple[str, str]:
    with pytest.raises(Unparsable) as error:
        read(path, limits)
    (problem,) = error.value.problems
    return problem.code, problem.message


def read_or_refused(path: Path) -> tuple[list[Member], list[tuple[str, str]]] | str:
    """What is read, or the code of what ends the reading."""
    try:
        return read(path)
    except Unparsable as error:
        return ", ".join(problem.code for problem in error.problems)


def packed(tmp_path: Path, kind: str, members: list[tuple[str, bytes]] | None = None) -> Path:
    members = MEMBERS if members is None else members
    if kind.startswith("zip"):
        return write_zip(tmp_path / "a", dict(members), zipfile.ZIP_STORED if kind == "zip-stored" else zipfile.ZIP_DEFLATED)
    styles = {"tar": tarfile.PAX_FORMAT, "tar-gnu": tarfile.GNU_FORMAT, "tar-ustar": tarfile.USTAR_FORMAT}
    style = styles.get(kind, tarfile.PAX_FORMAT)
    return write_tar(tmp_path / "a", members, "w:gz" if kind == "tar.gz" else "w", style)


@pytest.mark.parametrize("kind", ["zip", "zip-stored", "tar", "tar-gnu", "tar-ustar", "tar.gz"])
def test_members_come_whole_and_in_order(kind: str, tmp_path: Path) -> None:
    path = packed(tmp_path, kind)
    assert archive_kind(path) == kind.split("-")[0]
    assert read(path) == ([Member(*member) for member in MEMBERS], [])


@pytest.mark.parametrize("kind", ["zip", "tar", "tar-gnu", "tar.gz"])
def test_long_and_foreign_names(kind: str, tmp_path: Path) -> None:
    names = ["图片/猫.png", "x" * 90 + "/" + "y" * 90 + "/" + "é" * 50 + ".jpg", "./dot//a.png"]
    members, errors = read(packed(tmp_path, kind, [(name, name.encode()) for name in names]))
    assert [member.name for member in members] == [*names[:2], "dot/a.png"]
    assert [member.data.decode() for member in members] == names
    assert errors == []


def test_zip_names_in_utf8_that_do_not_say_so(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a", {"\u732b.png": b"1"})
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        flags = data.index(mark) + at
        data[flags : flags + 2] = b"\0\0"
    path.write_bytes(data)
    assert read(path)[0][0].name == "\u732b.png"


def test_folders_and_the_clutter_of_systems_are_passed_over(tmp_path: Path) -> None:
    names = ["d/", "__MACOSX/d/._a.png", "d/._a.png", ".DS_Store", "d/Thumbs.db", "d/a.png"]
    members, errors = read(write_zip(tmp_path / "a", {name: b"" if name == "d/" else b"1" for name in names}))
    assert [member.name for member in members] == ["d/a.png"]
    assert errors == []


def test_a_file_that_is_no_archive_is_none(tmp_path: Path) -> None:
    for data in (b"", b'{"a": 1}', b"a,b\n" * 300, b"BZh is no archive", b"\0" * 1024):
        (tmp_path / "a").write_bytes(data)
        assert archive_kind(tmp_path / "a") is None
    assert refusal(tmp_path / "a") == ("broken-archive", "the archive can't be read: neither a zip nor a tar file")


def test_other_kinds_are_told_what_to_do(tmp_path: Path) -> None:
    for data, kind in ((lzma.compress(b"x"), "xz"), (bz2.compress(b"x"), "bzip2"), (b"Rar!\x1a\x07\0", "rar")):
        (tmp_path / "a").write_bytes(data)
        assert refusal(tmp_path / "a") == ("archive-not-supported", f"a {kind} archive; pack the files as zip, tar or tar.gz")


def test_every_unsafe_name_is_named_with_every_reason(tmp_path: Path) -> None:
    names = ["../a", "/b", "C:\\c", "d/../../e", "f\ng", "x" * 1025, "ok", "a/./b"]
    wanted = [
        ("unsafe-archive-member", '"../a": the name leaves the archive\'s folder (..)'),
        ("unsafe-archive-member", '"/b": an absolute name; names must be relative'),
        ("unsafe-archive-member", '"C:\\\\c": an absolute name; names must be relative'),
        ("unsafe-archive-member", '"C:\\\\c": a backslash in the name; write / between folders'),
        ("unsafe-archive-member", '"d/../../e": the name leaves the archive\'s folder (..)'),
        ("unsafe-archive-member", '"f\\ng": a control character, or what is not UTF-8, in the name'),
        ("unsafe-archive-member", f'"{"x" * 60}…": a name of more than 1024 bytes'),
    ]
    for path in (
        packed(tmp_path, "zip", [(name, b"1") for name in names]),
        packed(tmp_path, "tar", [(name, b"1") for name in names]),
    ):
        members, errors = read(path)
        assert errors == wanted
        assert [member.name for member in members] == ["ok", "a/b"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("caf\udce9.png")
    path = tmp_path / "a"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        archive.addfile(info)
    ((code, message),) = read(path)[1]
    assert code == "unsafe-archive-member"
    assert "not UTF-8" in message


def test_links_devices_and_sparse_files_in_a_tar(tmp_path: Path) -> None:
    kinds = {
        "soft": (tarfile.SYMTYPE, "link"),
        "hard": (tarfile.LNKTYPE, "link"),
        "pipe": (tarfile.FIFOTYPE, "device"),
        "disk": (tarfile.BLKTYPE, "device"),
        "hole": (tarfile.GNUTYPE_SPARSE, "sparse file"),
    }
    with tarfile.open(tmp_path / "a", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, (kind, _) in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("after"))
    members, errors = read(tmp_path / "a")
    assert errors == [
        ("unsafe-archive-member", f'"{name}": a {what}; only files may stand in a dataset') for name, (_, what) in kinds.items()
    ]
    assert [member.name for member in members] == ["after"]


def test_encrypted_members_and_unknown_compression_of_a_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a", {"a": b"1", "b": b"2"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert read(path) == ([Member("b", b"2")], [("encrypted-member", '"a": the member is encrypted; pack it without a password')])
    errors = read(write_zip(tmp_path / "a", {"a": b"1"}, zipfile.ZIP_BZIP2))[1]
    assert errors == [("broken-member", '"a": compression method 12; use store or deflate')]


def test_archives_inside_archives_are_refused_by_content(tmp_path: Path) -> None:
    inner = write_zip(tmp_path / "i", {"a": b"1"}).read_bytes()
    shard = write_tar(tmp_path / "j", [("a", b"1")]).read_bytes()
    members = [("a.jpg", inner), ("b.jpg", gzip.compress(b"1")), ("c.tar", shard), ("d.zip", b"only a name")]
    for kind in ("zip", "tar"):
        kept, errors = read(packed(tmp_path, kind, members))
        assert errors == [
            ("nested-archive", f'"{name}": a {what} file inside the archive; put its files there instead')
            for name, what in (("a.jpg", "zip"), ("b.jpg", "gzip"), ("c.tar", "tar"))
        ]
        assert [member.name for member in kept] == ["d.zip"]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_name_twice_is_refused_the_second_time(kind: str, tmp_path: Path) -> None:
    if kind == "zip":
        path = write_zip(tmp_path / "a", {"a": b"1", "./a": b"2"})
    else:
        path = packed(tmp_path, kind, [("a", b"1"), ("./a", b"2")])
    assert read(path) == ([Member("a", b"1")], [("duplicate-member", '"./a": the name stands twice in the archive')])


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip-stored"])
def test_a_member_over_the_limit_is_passed_over_and_the_next_one_read(kind: str, tmp_path: Path) -> None:
    path = packed(tmp_path, kind, [("a", b"1" * 1000), ("b", b"2")])
    assert read(path, Limits(member_bytes=999)) == (
        [Member("b", b"2")],
        [("member-too-large", '"a": 1000 bytes; a member may have 999')],
    )


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_too_many_members_and_too_many_bytes_end_the_reading(kind: str, tmp_path: Path) -> None:
    path = packed(tmp_path, kind, [(str(number), b"1" * 100) for number in range(20)])
    code, message = refusal(path, Limits(members=19))
    assert code == ("broken-archive" if kind == "zip" else "too-many-members")
    assert "more than 19" in message
    assert refusal(path, Limits(total_bytes=1050))[0] == "archive-expands-too-far"
    assert len(read(path, Limits(members=20, total_bytes=2000))[0]) == 20


def test_what_expands_too_far_is_refused_as_a_member_or_ends_the_reading(tmp_path: Path) -> None:
    zeros = b"\0" * (3 << 20)
    noise = np.random.default_rng(0).bytes(200_000)
    limits = Limits(ratio=50, ratio_from=1 << 16)
    members, ((code, message),) = read(write_zip(tmp_path / "z", {"a": zeros, "b": noise}), limits)
    assert members == [Member("b", noise)]
    assert code == "archive-expands-too-far"
    assert message.startswith('"a": ')
    assert message.endswith(" bytes unpack to 3145728, more than 50 times as many")
    path = write_tar(tmp_path / "t", [("a", zeros)], "w:gz")
    assert refusal(path, limits)[0] == "archive-expands-too-far"


def test_a_gzip_is_read_to_its_end_where_its_checksum_stands(tmp_path: Path) -> None:
    path = packed(tmp_path, "tar.gz")
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(4) + data[-4:])
    assert refusal(path)[0] == "broken-archive"
    path.write_bytes(data + gzip.compress(b"\0" * (300 << 20), 1))
    assert refusal(path)[0] == "archive-expands-too-far"


def test_a_gzip_that_never_becomes_a_member_is_stopped_too(tmp_path: Path) -> None:
    """A pax record of a declared gibibyte: the standard library would take it into memory."""
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    with gzip.open(tmp_path / "a", "wb", 1) as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(b"\0" * (4 << 20))
    assert refusal(tmp_path / "a") == (
        "broken-archive",
        "the archive can't be read: a name or record of 1073741824 bytes at byte 512",
    )


def test_lying_sizes_of_a_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a", {"a": b"abc" * 1000})
    data = bytearray(path.read_bytes())
    for declared in (10, 5000):
        at = data.index(b"PK\x01\x02") + 24
        data[at : at + 4] = struct.pack("<L", declared)
        path.write_bytes(data)
        members, ((code, message),) = read(path)
        assert members == []
        assert code == "broken-member"
        assert message.startswith('"a": ')


def test_a_zip_whose_members_share_bytes_can_not_grow_without_end(tmp_path: Path) -> None:
    """Fifield's overlap (WOOT 2019): many entries of the directory name the same compressed bytes."""
    path = write_zip(tmp_path / "a", {"a": b"\0" * (1 << 16)})
    data = path.read_bytes()
    begin, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    count = 2000
    directory = b"".join(data[begin:end].replace(b"a", b"b") for _ in range(count))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), begin, 0)
    path.write_bytes(data[:begin] + directory + tail)
    assert refusal(path)[0] == "archive-expands-too-far"


def test_a_zip_directory_out_of_measure_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a", {str(number): b"" for number in range(50)})
    assert refusal(path, Limits(members=49)) == (
        "broken-archive",
        "the archive can't be read: a zip directory of more than 49 entries; split the dataset",
    )
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 1 << 31, 0, 0)
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100 + tail)
    assert refusal(path) == ("broken-archive", "the archive can't be read: a zip directory of 2147483648 bytes")


def test_zip64_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive, archive.open("a", "w", force_zip64=True) as member:
        member.write(b"1")
    assert read(tmp_path / "a") == ([Member("a", b"1")], [])
    end = (tmp_path / "a").read_bytes()
    at = end.index(b"PK\x05\x06")
    count, length, offset = struct.unpack_from("<H2L", end, at + 10)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "b").write_bytes(end[:at] + record + locator + tail)
    assert read(tmp_path / "b") == ([Member("a", b"1")], [])


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_cut_off_anywhere_is_refused_or_was_whole(kind: str, tmp_path: Path) -> None:
    data = packed(tmp_path, kind).read_bytes()
    whole = [Member(*member) for member in MEMBERS]
    found = []
    for length in range(1, len(data), 37):
        (tmp_path / "cut").write_bytes(data[:length])
        found.append(read_or_refused(tmp_path / "cut"))
    # A tar is whole where a member ends, or in the padding behind the last.
    allowed = ["broken-archive", *((whole[:count], []) for count in range(len(whole) + 1) if kind == "tar")]
    assert all(one in allowed for one in found)
    assert found.count("broken-archive") > 10


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_damage_anywhere_never_does_more_than_refuse(kind: str, tmp_path: Path) -> None:
    data = packed(tmp_path, kind).read_bytes()
    for at in range(0, min(len(data), 12_000), 31):
        (tmp_path / "hurt").write_bytes(data[:at] + bytes([data[at] ^ 0xA5]) + data[at + 1 :])
        found = read_or_refused(tmp_path / "hurt")
        if isinstance(found, str):
            assert found in ("broken-archive", "archive-expands-too-far", "archive-not-supported")
        else:
            assert len(found[0]) + len(found[1]) <= len(MEMBERS)


def test_pax_records_that_lie(tmp_path: Path) -> None:
    def tar(record: bytes) -> Path:
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(record)
        file = io.BytesIO()
        file.write(info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0"))
        file.write(tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT))
        (tmp_path / "a").write_bytes(file.getvalue())
        return tmp_path / "a"

    assert read(tar(b"10 path=b\n"))[0] == [Member("b", b"")]
    assert read(tar(b"14 path=../b\n\n"))[1][0][0] == "unsafe-archive-member"
    for record, words in (
        (b"99999 path=b\n", "a pax record that can't be read"),
        (b"x path=b\n", "a pax record that can't be read"),
        (b"11 size=-1\n", "a member of '-1' bytes"),
        (b"22 GNU.sparse.major=1\n", "a sparse file; pack it as an ordinary one"),
        (b"13 size=9999\n", "it ends at byte 1536 inside a member; it was cut off"),
    ):
        assert refusal(tar(record)) == ("broken-archive", f"the archive can't be read: {words}")


@needs_data
@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("23_zip_slip.zip", ["unsafe-archive-member"] * 4),
        ("24_zip_symlink.zip", ["unsafe-archive-member"]),
        ("28_truncated_jpeg.zip", []),
    ],
)
def test_the_hostile_examples(name: str, codes: list[str]) -> None:
    assert [code for code, _ in read(DATA / "bad" / name)[1]] == codes


@needs_data
def test_the_bomb_of_the_examples() -> None:
    code, message = refusal(DATA / "bad" / "25_zip_bomb_1gb.zip")
    assert code == "archive-expands-too-far"
    assert message.startswith('"images/big.bmp": ')
