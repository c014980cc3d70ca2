"""The picture cache: a dataset's pictures at the size a model takes, in one closed folder that the trainer maps into memory.

The preparer writes it once per (dataset, resize rule, decoder); nobody else decodes for training. `pixels.bin` holds the
pictures end to end, uint8 [height, width, 3] each; `sizes.npy` int32 [pictures, 2] their heights and widths; `names.json` maps
the name of every member to its picture's index. Pictures whose files are equal, byte for byte, are held once: the same index
under two names also tells a contrastive loss that they are no negatives of each other.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.data.pictures.archive import Member
from core.data.pictures.decode import BACKGROUND, DECODER_VERSION, Pixels, decode_picture
from core.data.pictures.resize import ResizeRule
from core.errors import ArtifactError, InvalidInput
from core.manifest import closed_folder, verify_folder

PICTURE_CACHE_KIND = "pictures"
PIXELS_FILE, SIZES_FILE, NAMES_FILE = "pixels.bin", "sizes.npy", "names.json"


def picture_cache_key(dataset_sha256: str, rule: ResizeRule) -> str:
    """What a cache is stored under: equal keys are equal pixels."""
    parts = [dataset_sha256, rule.facts(), DECODER_VERSION, BACKGROUND]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def write_picture_cache(
    folder: Path, members: Iterable[Member], wanted: frozenset[str], rule: ResizeRule, facts: dict[str, Any]
) -> int:
    """Decode, resize and write the `wanted` members, in the order they come in; returns the number of pictures held.

    `facts` gets the rule and the counts. Memory is that of one picture. Raises InvalidInput with every member that can't be
    decoded and every wanted one that did not come: the folder then does not appear.
    """
    with closed_folder(folder, PICTURE_CACHE_KIND, facts) as temporary:
        written = _Written()
        with (temporary / PIXELS_FILE).open("wb") as file:
            for pixels in written.pictures(members, wanted, rule):
                file.write(pixels.data)
        missing = sorted(wanted - written.names.keys() - written.refused)
        problems = [*written.problems, *(f"{name}: not in the archive" for name in missing)]
        if problems:
            raise InvalidInput("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
        np.save(temporary / SIZES_FILE, np.asarray(written.sizes, np.int32).reshape(-1, 2))
        (temporary / NAMES_FILE).write_text(json.dumps(written.names, ensure_ascii=False), encoding="utf-8")
        facts |= {"rule": rule.facts(), "decoder": DECODER_VERSION, "pictures": len(written.sizes), "names": len(written.names)}
    return len(written.sizes)


class _Written:
    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.sizes: list[tuple[int, int]] = []
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
                yield pixels
            self.names[name] = index


class PictureCache:
    """A picture cache opened for reading; pictures are views of the mapped file, shared by all that open it."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        sizes: npt.NDArray[np.int32] = np.load(folder / SIZES_FILE, allow_pickle=False)
        names: dict[str, int] = json.loads((folder / NAMES_FILE).read_text(encoding="utf-8"))
        ends = np.cumsum(sizes.astype(np.int64).prod(axis=1) * 3)
        total = int(ends[-1]) if len(ends) else 0
        path = folder / PIXELS_FILE
        if path.stat().st_size != total or any(not 0 <= index < len(sizes) for index in names.values()):
            raise ArtifactError(f"{folder.name}: {PIXELS_FILE}, {SIZES_FILE} and {NAMES_FILE} do not belong together")
        self.facts = facts
        self.sizes = sizes
        """int32 [pictures, 2], heights and widths."""
        self.index_of: Mapping[str, int] = names
        """Name of a member -> its picture."""
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

    def batch(self, indices: Sequence[int]) -> Pixels:
        """uint8 [len(indices), height, width, 3], copied. Raises ValueError where the pictures differ in size."""
        return np.stack([self.picture(index) for index in indices])
