"""The token cache: a dataset as it is trained on, in one closed folder that the training child maps into memory.

The preparer writes it once per (dataset, tokenizer, template, length, mask); nobody else makes tokens for training.
`tokens.safetensors` holds `offsets` int64 [sequences + 1], `row_numbers` int64 [sequences] (rows of the upload, from 1),
`input_ids` int32 [tokens] and `loss_mask` uint8 [tokens], sequences end to end. An example is `group` sequences that stand
together: one, or the chosen and the rejected one of a preference. The file is put together from two spool files, since
safetensors wants sizes first and the tokens of a large dataset do not fit into memory.
"""

import hashlib
import itertools
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from core.errors import ArtifactError
from core.manifest import closed_folder, verify_folder
from core.records import TokenCounts
from core.run import TOKEN_CACHE_KIND

TOKENS_FILE = "tokens.safetensors"
_HEADER_LIMIT = 1 << 20
_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
# Widest first: every array then begins at a multiple of its item size.
_LAYOUT = (("offsets", "I64"), ("row_numbers", "I64"), ("input_ids", "I32"), ("loss_mask", "U8"))


TokenSequence = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""(ids int32 [T], loss mask uint8 [T]) as read-only views; a mask of 1 means that the token there is predicted."""


class TokenRow(NamedTuple):
    """A rendered sequence: the number of its row in the upload, ids, and 1 per id that carries loss."""

    number: int
    ids: list[int]
    mask: list[int]


def write_token_cache(
    folder: Path,
    dataset_id: str,
    rows: Iterable[TokenRow],
    max_length: int,
    facts: dict[str, Any],
    group: int = 1,
    kept_end: int = 0,
) -> TokenCounts:
    """Write the closed folder and return its counts, which join `facts` and `group` in the manifest.

    `rows` come in examples of `group` sequences each, those of one row of the upload behind one another. Sequences of more than
    `max_length` tokens lose what stands before their last `kept_end` ones; an example of which one sequence is left without a
    trained token is dropped whole.
    """
    with closed_folder(folder, TOKEN_CACHE_KIND, facts) as temporary:
        counts = _write(temporary, dataset_id, rows, (max_length, kept_end), group)
        facts |= counts.model_dump(mode="json") | {"group": group}
    return counts


class TokenCache:
    """A token cache opened for reading; its arrays are maps of the file, shared by all that open it.

    Its length is its number of examples, each of `group` sequences.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        arrays = _map_arrays(folder / TOKENS_FILE)
        self.facts = facts
        self.group: int = facts.get("group", 1)
        self.row_numbers: npt.NDArray[np.int64] = arrays["row_numbers"]
        self._offsets: npt.NDArray[np.int64] = arrays["offsets"]
        self._ids: npt.NDArray[np.int32] = arrays["input_ids"]
        self._mask: npt.NDArray[np.uint8] = arrays["loss_mask"]

    @classmethod
    def open(cls, folder: Path) -> "TokenCache":
        """Raises ArtifactError when the folder is unfinished or differs from its manifest."""
        return cls(folder, verify_folder(folder, TOKEN_CACHE_KIND))

    def __len__(self) -> int:
        return len(self.row_numbers) // self.group

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self._offsets)

    def example(self, index: int) -> tuple[TokenSequence, ...]:
        """The `group` sequences of one example: one, or (chosen, rejected)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return tuple(self.row(index * self.group + place) for place in range(self.group))

    def row(self, index: int) -> TokenSequence:
        """One sequence; where `group` is 1 its index is the example's."""
        if not 0 <= index < len(self.row_numbers):
            raise IndexError(index)
        begin, end = self._offsets[index], self._offsets[index + 1]
        return self._ids[begin:end], self._mask[begin:end]

    def row_digest(self, index: int) -> str:
        """Hex digest of a sequence's ids and mask: equal for sequences that teach the same."""
        ids, mask = self.row(index)
        digest = hashlib.sha256(ids.tobytes())
        digest.update(mask.tobytes())
        return digest.hexdigest()


def _write(folder: Path, dataset_id: str, rows: Iterable[TokenRow], cut: tuple[int, int], group: int) -> TokenCounts:
    spools = (folder / "ids.spool", folder / "mask.spool")
    with spools[0].open("wb") as ids_file, spools[1].open("wb") as mask_file:
        written = _Written(ids_file, mask_file, *cut)
        for example in _examples(rows, group):
            written.take(example)
    _assemble(folder / TOKENS_FILE, written.offsets, written.numbers, spools)
    for spool in spools:
        spool.unlink()
    return TokenCounts(
        dataset_id=dataset_id,
        rows=written.rows,
        examples=len(written.numbers) // group,
        tokens=written.offsets[-1],
        trained_tokens=written.trained,
        truncated_rows=written.truncated,
        rows_without_target=written.rows - written.kept_rows,
        longest=written.longest,
        squared_tokens=sum((end - begin) ** 2 for begin, end in itertools.pairwise(written.offsets)),
    )


def _examples(rows: Iterable[TokenRow], group: int) -> Iterator[list[TokenRow]]:
    example: list[TokenRow] = []
    for row in rows:
        example.append(row)
        if len(example) == group:
            assert all(other.number == row.number for other in example), f"row {row.number} is no group of {group}"
            yield example
            example = []
    assert not example, f"row {example[-1].number} is no group of {group}"


@dataclass
class _Written:
    """What the spool files hold so far. Rows are counted by their numbers, since a row may give several examples."""

    ids_file: BinaryIO
    mask_file: BinaryIO
    max_length: int
    kept_end: int
    offsets: "array[int]" = field(default_factory=lambda: array("q", [0]))
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    rows: int = 0
    kept_rows: int = 0
    truncated: int = 0
    trained: int = 0
    longest: int = 0
    _read: int | None = None  # the row of the example before, and the last ones that were kept and cut
    _kept: int | None = None
    _cut: int | None = None

    def take(self, example: list[TokenRow]) -> None:
        number = example[0].number
        lengths = [len(sequence.ids) for sequence in example]
        masks = [np.asarray(self._cut_at_length(sequence.mask), np.uint8) for sequence in example]
        trained = [int(np.count_nonzero(mask)) for mask in masks]
        self.longest = max(self.longest, *lengths)
        self.rows += number != self._read
        self._read = number
        if max(lengths) > self.max_length:
            self.truncated += number != self._cut
            self._cut = number
        if not all(trained):
            return
        self.kept_rows += number != self._kept
        self._kept = number
        self.trained += sum(trained)
        for sequence, mask in zip(example, masks, strict=True):
            np.asarray(self._cut_at_length(sequence.ids), "<i4").tofile(self.ids_file)
            mask.tofile(self.mask_file)
            self.offsets.append(self.offsets[-1] + len(mask))
            self.numbers.append(number)

    def _cut_at_length(self, values: list[int]) -> list[int]:
        if len(values) <= self.max_length:
            return values
        return [*values[: self.max_length - self.kept_end], *values[len(values) - self.kept_end :]]


def _assemble(path: Path, offsets: "array[int]", numbers: "array[int]", spools: tuple[Path, Path]) -> None:
    lengths = {
        "offsets": len(offsets),
        "row_numbers": len(numbers),
        "input_ids": offsets[-1],
        "loss_mask": offsets[-1],
    }
    header: dict[str, Any] = {}
    at = 0
    for name, dtype in _LAYOUT:
        end = at + lengths[name] * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": [lengths[name]], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        np.frombuffer(offsets, np.int64).astype("<i8").tofile(file)
        np.asarray(numbers, "<i8").tofile(file)
        for spool in spools:
            with spool.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)


def _map_arrays(path: Path) -> dict[str, Any]:
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _HEADER_LIMIT:
            raise ArtifactError(f"{path.name}: not a token file")
        header = json.loads(file.read(length))
    arrays: dict[str, Any] = {}
    for name, dtype in _LAYOUT:
        entry = header[name]
        begin, end = entry["data_offsets"]
        if entry["dtype"] != dtype or 8 + length + end > size:
            raise ArtifactError(f"{path.name}: {name} is not what a token file holds")
        shape = tuple(entry["shape"])
        # A file of no rows has arrays of no bytes, which can't be mapped.
        at = 8 + length + begin
        mapped = np.memmap(path, _DTYPES[dtype], "r", at, shape) if end > begin else np.empty(shape, _DTYPES[dtype])
        arrays[name] = np.asarray(mapped)
    return arrays
