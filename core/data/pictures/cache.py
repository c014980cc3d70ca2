"""The picture cache: a dataset's pictures at the size a model takes, in one closed folder that the trainer maps into memory.

The preparer writes it once per (dataset, image processor); nobody else decodes for training. `pixels.bin` holds the
pictures end to end, uint8 [height, width, 3] each; `sizes.npy` int32 [pictures, 2] their heights and widths; `digests.npy`
uint8 [pictures, 32] tells pictures of equal pixels, in this cache or another; `rows.npy` int64 [n, 2] maps the rows of the
upload, from 1, to the pictures they name. Pictures whose files are equal, byte for byte, are held once.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.data.pictures.archive import Member
from core.data.pictures.decode import Pixels, decode_picture
from core.data.pictures.resize import ResizeRule
from core.errors import ArtifactError, InvalidInput
from core.manifest import closed_folder, verify_folder
from core.run import DECODER_VERSION, PICTURE_CACHE_KIND

PIXELS_FILE, SIZES_FILE, DIGESTS_FILE, ROWS_FILE = "pixels.bin", "sizes.npy", "digests.npy", "rows.npy"


def write_picture_cache(
    folder: Path, members: Iterable[Member], rows: Sequence[tuple[int, str]], rule: ResizeRule, facts: dict[str, Any]
) -> int:
    """Decode, resize and write the members that rows name, in the order they come in; returns the number of pictures held.

    `rows` are (number in the upload, name of a member), a row of several pictures several times, in their order. `facts` gets
    the rule and the counts. Memory is that of one picture. Raises InvalidInput with every member that can't be decoded and every
    wanted one that did not come: the folder then does not appear.
    """
    with closed_folder(folder, PICTURE_CACHE_KIND, facts) as temporary:
        written = _Written()
        wanted = frozenset(name for _, name in rows)
        with (temporary / PIXELS_FILE).open("wb") as file:
            for pixels in written.pictures(members, wanted, rule):
                file.write(pixels.data)
        missing = sorted(wanted - written.names.keys() - written.refused)
        problems = [*written.problems, *(f"{name}: not in the archive" for name in missing)]
        if problems:
            raise InvalidInput("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
        np.save(temporary / SIZES_FILE, np.asarray(written.sizes, np.int32).reshape(-1, 2))
        np.save(temporary / DIGESTS_FILE, np.frombuffer(b"".join(written.digests), np.uint8).reshape(-1, 32))
        named = [(number, written.names[name]) for number, name in rows]
        np.save(temporary / ROWS_FILE, np.asarray(named, np.int64).reshape(-1, 2))
        facts |= {"rule": rule.facts(), "decoder": DECODER_VERSION, "pictures": len(written.sizes)}
    return len(written.sizes)


class _Written:
    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.sizes: list[tuple[int, int]] = []
        self.digests: list[bytes] = []
        self.refused: set[str] = set()
        self.problems: list[str] = []
        self._by_digest: dict[bytes, int] = {}

    def pictures(self, members: Iterable[Member], wanted: frozenset[str], rule: ResizeRule) -> Iterator[Pixels]:
        for name, data in members:
            if name not in wanted:
                continue
            digest = hashlib.sha256(data).digest()
            index = self._by_digest.setdefault(digest, len(self.sizes))
            if index == len(self.sizes):
                try:
                    pixels = rule.apply(decode_picture(data, name).image)
                except InvalidInput as error:
                    self.problems.append(error.detail)
                    self.refused.add(name)
                    del self._by_digest[digest]
                    continue
                self.sizes.append((pixels.shape[0], pixels.shape[1]))
                self.digests.append(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest())
                yield pixels
            self.names[name] = index


class PictureCache:
    """A picture cache opened for reading; pictures are views of the mapped file, shared by all that open it."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        sizes: npt.NDArray[np.int32] = np.load(folder / SIZES_FILE, allow_pickle=False)
        digests: npt.NDArray[np.uint8] = np.load(folder / DIGESTS_FILE, allow_pickle=False)
        rows: npt.NDArray[np.int64] = np.load(folder / ROWS_FILE, allow_pickle=False)
        ends = np.cumsum(sizes.astype(np.int64).prod(axis=1) * 3)
        total = int(ends[-1]) if len(ends) else 0
        path = folder / PIXELS_FILE
        is_within = bool(((rows[:, 1] >= 0) & (rows[:, 1] < len(sizes))).all())
        if path.stat().st_size != total or len(digests) != len(sizes) or not is_within:
            raise ArtifactError(f"{folder.name}: its files do not belong together")
        self.facts = facts
        self.sizes = sizes
        """int32 [pictures, 2], heights and widths."""
        self.digests = digests
        """uint8 [pictures, 32], equal for equal pixels."""
        self.rows = rows
        """int64 [n, 2]: the number of a row in the upload, and a picture that it names."""
        self._ends = ends
        # A file of no bytes can't be mapped.
        self._pixels: npt.NDArray[np.uint8] = np.asarray(np.memmap(path, np.uint8, "r") if total else np.empty(0, np.uint8))

    @classmethod
    def open(cls, folder: Path) -> "PictureCache":
        """Raises ArtifactError when the folder is unfinished or differs from its manifest."""
        return cls(folder, verify_folder(folder, PICTURE_CACHE_KIND))

    def __len__(self) -> int:
        return len(self.sizes)

    def picture(self, index: int) -> Pixels:
        """uint8 [height, width, 3], a read-only view."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        height, width = map(int, self.sizes[index])
        end = int(self._ends[index])
        return self._pixels[end - height * width * 3 : end].reshape(height, width, 3)
