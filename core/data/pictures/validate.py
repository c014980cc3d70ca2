"""An archive of pictures judged: which rows can be used, and what is wrong with the others and with the pictures.

Second stop of a picture dataset's walk, between `archive` and rows.jsonl, in the preparer's child alone. The archive is read
once; each picture is decoded whole, for a header proves nothing, and let go. Rows come from one annotation file (JSON Lines,
JSON array, CSV, COCO's captions), or from the texts beside the pictures, as webdataset shards have them. Where several files
could be the annotations, metadata.jsonl or metadata.csv is; else the upload is refused rather than guessed at.

An archive with a member that is refused can't be used at all. A picture that can't be decoded costs the rows that name it.

Codes beside those of `archive`, `reader` and `data.validate`. File errors: no-annotations, several-annotations,
texts-too-large, unknown-image-id. Row errors: missing-image, image-ref, image-count, bad-image, missing-caption, duplicate-stem.
Warnings: unused-image, bad-image (of no row), first-frame, ignored-file.
"""

import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path

from core.data.conversation import Parsed, images_of
from core.data.findings import Findings
from core.data.pictures.archive import read_archive
from core.data.pictures.coco import coco_rows
from core.data.pictures.decode import EXTENSIONS, decode_picture
from core.data.pictures.formats import coco_format, picture_formats
from core.data.pictures.names import PictureNames
from core.data.pictures.sidecars import CAPTION_EXTENSIONS, extension_of, sidecar_rows, stem_of
from core.data.reader import Row, open_rows
from core.data.strict_json import shown
from core.data.validate import Judge
from core.errors import InvalidInput, Problem, Unparsable
from core.records import DatasetReport

TEXT_BYTES = 256 << 20
"""Of all members that may be annotations or captions: they are held until it is known which are."""
_ANNOTATIONS = ("jsonl", "ndjson", "json", "csv")
_CHOSEN = ("metadata.jsonl", "metadata.csv")
_NAMED = 5


def validate_pictures(upload: Path, scratch: Path, keep: Callable[[int, Parsed], None]) -> DatasetReport:
    """Read a whole archive, call `keep(row number, row)` for every usable row, and report.

    Never raises for what stands in the archive. `scratch` is a folder for the annotation file, which goes there under a name
    of our own and is removed; no other member is written to disk.
    """
    named: set[str] = set()

    def keep_named(number: int, parsed: Parsed) -> None:
        named.update(images_of(parsed))
        keep(number, parsed)

    judge = Judge(keep_named, has_pictures=True)
    contents = _Contents(judge.findings)
    try:
        contents.read(upload)
    except Unparsable as error:
        return judge.report(broken_by=error.problems)
    is_refused = judge.findings.error_count > 0
    annotations = scratch / "annotations"
    try:
        names = _judge_rows(judge, contents, annotations)
    except Unparsable as error:
        return judge.report(broken_by=error.problems)
    finally:
        annotations.unlink(missing_ok=True)
    _look_at_pictures(judge.findings, contents, names)
    if is_refused:
        message = "members of the archive are refused, so nothing of it is used"
        return judge.report(broken_by=(Problem("refused-archive", message),))
    return judge.report(pictures=len(named))


class _Contents:
    """What one reading of an archive leaves: of pictures their names and faults, of texts the bytes."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.pictures: dict[str, str | None] = {}
        """Name -> why it can't be used, or None."""
        self.notes: dict[str, tuple[str, ...]] = {}
        self.texts: dict[str, bytes] = {}
        self.others: list[str] = []

    def read(self, upload: Path) -> None:
        """Raises Unparsable where the archive can't be read on."""
        held = 0
        for name, data in read_archive(upload, self._findings):
            extension = extension_of(name)
            if extension in EXTENSIONS:
                self._take_picture(name, data)
            elif extension in (*_ANNOTATIONS, *CAPTION_EXTENSIONS):
                held += len(data)
                if held > TEXT_BYTES:
                    message = f"{shown(name)}: with it the archive's texts have more than {TEXT_BYTES >> 20} MiB"
                    raise Unparsable(message, [Problem("texts-too-large", message)])
                self.texts[name] = data
            else:
                self.others.append(name)

    def named(self) -> dict[str, str | None]:
        """What a row may mean by a name, and why it can't be used or None."""
        other = f"not a picture by its name; read are {', '.join(sorted(EXTENSIONS))}"
        return {name: f"{name}: {other}" for name in self.others} | self.pictures

    def sidecars(self) -> set[str]:
        """The texts that stand beside a picture."""
        stems = {stem_of(name) for name in self.pictures}
        return {name for name in self.texts if extension_of(name) in ("json", *CAPTION_EXTENSIONS) and stem_of(name) in stems}

    def _take_picture(self, name: str, data: bytes) -> None:
        try:
            found = decode_picture(data, name, at_least=1)  # reduced: every byte is read, few pixels are made
        except InvalidInput as error:
            self.pictures[name] = error.detail
            return
        self.pictures[name] = None
        if found.notes:
            self.notes[name] = found.notes


def _judge_rows(judge: Judge, contents: _Contents, annotations: Path) -> PictureNames:
    """Judge every row there is. Raises Unparsable where there are none, or they can't be read on."""
    sidecars = contents.sidecars()
    files = [name for name in contents.texts if extension_of(name) in _ANNOTATIONS and name not in sidecars]
    chosen = _choose(files)
    if chosen is None and not sidecars:
        message = "no annotations: put a metadata.jsonl beside the pictures, or a text of the same name beside each"
        raise Unparsable(message, [Problem("no-annotations", message)])
    if chosen is None:
        contents.others += contents.texts.keys() - sidecars
        names = PictureNames(contents.named())
        judge.formats = picture_formats(names)
        judge.read(sidecar_rows(contents.pictures, {name: contents.texts[name] for name in sidecars}))
        return names
    contents.others += contents.texts.keys() - {chosen}
    names = PictureNames(contents.named(), posixpath.dirname(chosen))
    judge.formats = picture_formats(names)
    annotations.write_bytes(contents.texts[chosen])
    contents.texts.clear()
    judge.read(_annotated(judge, annotations, chosen, names))
    return names


def _annotated(judge: Judge, path: Path, name: str, names: PictureNames) -> Iterator[Row | Problem]:
    rows = coco_rows(path, judge.findings)
    if rows is not None:
        judge.formats = {"coco_captions": coco_format(names)}
        return rows
    file = open_rows(path, name)
    if file.has_bom:
        judge.findings.warn(Problem("utf8-bom", f"{shown(name)} begins with a byte order mark, which was dropped", line=1))
    return file.rows


def _choose(files: list[str]) -> str | None:
    """The annotation file. Raises Unparsable where several could be it."""
    named = [name for name in files if posixpath.basename(name) in _CHOSEN]
    if not files:
        return None
    if len(named) == 1 or len(files) == 1:
        return (named or files)[0]
    message = f"several files may be the annotations ({_listed(files)}); leave one, or name it metadata.jsonl"
    raise Unparsable(message, [Problem("several-annotations", message)])


def _look_at_pictures(findings: Findings, contents: _Contents, names: PictureNames) -> None:
    """What deserves a look beside the rows."""
    unused = sorted(contents.pictures.keys() - names.used)
    if sound := [name for name in unused if contents.pictures[name] is None]:
        findings.warn(Problem("unused-image", f"pictures that no row names: {_listed(sound)}"))
    if contents.others:
        findings.warn(Problem("ignored-file", f"neither pictures nor the annotations, and ignored: {_listed(contents.others)}"))
    for name in unused:
        if (reason := contents.pictures[name]) is not None:
            findings.warn(Problem("bad-image", f"{reason}; no row names it"))
    for name in sorted(names.used & contents.notes.keys()):
        for note in contents.notes[name]:
            findings.warn(Problem("first-frame", f"{shown(name)}: {note}"))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(shown, sorted(names)[:_NAMED])) + more
