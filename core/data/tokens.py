"""The token cache: a dataset as it is trained on, in one closed folder that the training child maps into memory.

The preparer writes it once per (dataset, tokenizer, template, length, mask); nobody else makes tokens for training.
`tokens.safetensors` holds `offsets` int64 [rows + 1], `row_numbers` int64 [rows] (rows of the upload, from 1),
`input_ids` int32 [tokens] and `loss_mask` uint8 [tokens], rows end to end. The file is put together from two spool
files, since safetensors wants sizes first and the tokens of a large dataset do not fit into memory.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

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


class TokenRow(NamedTuple):
    """A rendered row: its number in the upload, ids, and 1 per id that carries loss."""

    number: int
    ids: list[int]
    mask: list[int]


def write_token_cache(
    folder: Path, dataset_id: str, rows: Iterable[TokenRow], max_length: int, facts: dict[str, Any]
) -> TokenCounts:
    """Write the closed folder and return its counts, which join `facts` in the manifest.

    Rows are cut from the end at `max_length` tokens; rows left without a trained token are dropped and counted.
    `rows`, `tokens` and `trained_tokens` count what is kept.
    """
    with closed_folder(folder, TOKEN_CACHE_KIND, facts) as temporary:
        counts = _write(temporary, dataset_id, rows, max_length)
        facts |= counts.model_dump(mode="json")
    return counts


class TokenCache:
    """A token cache opened for reading; its arrays are maps of the file, shared by all that open it."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        arrays = _map_arrays(folder / TOKENS_FILE)
        self.facts = facts
        self.row_numbers: npt.NDArray[np.int64] = arrays["row_numbers"]
        self._offsets: npt.NDArray[np.int64] = arrays["offsets"]
        self._ids: npt.NDArray[np.int32] = arrays["input_ids"]
        self._mask: npt.NDArray[np.uint8] = arrays["loss_mask"]

    @classmethod
    def open(cls, folder: Path) -> "TokenCache":
        """Raises ArtifactError when the folder is unfinished or differs from its manifest."""
        return cls(folder, verify_folder(folder, TOKEN_CACHE_KIND))

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self._offsets)

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """(ids, loss mask) of one row as read-only views of the same length."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, end = self._offsets[index], self._offsets[index + 1]
        return self._ids[begin:end], self._mask[begin:end]

    def row_digest(self, index: int) -> str:
        """Hex digest of a row's ids and mask: equal for rows that teach the same."""
        ids, mask = self.row(index)
        digest = hashlib.sha256(ids.tobytes())
        digest.update(mask.tobytes())
        return digest.hexdigest()


def _write(folder: Path, dataset_id: str, rows: Iterable[TokenRow], max_length: int) -> TokenCounts:
    offsets, numbers = array("q", [0]), array("q")
    trained = truncated = without_target = longest = 0
    spools = (folder / "ids.spool", folder / "mask.spool")
    with spools[0].open("wb") as ids_file, spools[1].open("wb") as mask_file:
        for number, ids, mask in rows:
            longest = max(longest, len(ids))
            truncated += len(ids) > max_length
            kept = mask[:max_length]
            if not any(kept):
                without_target += 1
                continue
            trained += sum(kept)
            np.asarray(ids[:max_length], "<i4").tofile(ids_file)
            mask_file.write(bytes(kept))
            offsets.append(offsets[-1] + len(kept))
            numbers.append(number)
    _assemble(folder / TOKENS_FILE, offsets, numbers, spools)
    for spool in spools:
        spool.unlink()
    return TokenCounts(
        dataset_id=dataset_id,
        rows=len(numbers) + without_target,
        tokens=offsets[-1],
        trained_tokens=trained,
        truncated_rows=truncated,
        rows_without_target=without_target,
        longest=longest,
    )


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
