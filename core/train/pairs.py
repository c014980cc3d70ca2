"""Pictures and their captions as they are drawn: a token cache and a picture cache of the same rows, as one.

An example is one caption with its picture; a picture with five captions makes five. Pixels stay where they are mapped until a
batch is laid out; what goes to the device is a byte a value, normalised there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from core.data.pictures.cache import PictureCache
from core.data.tokens import TokenCache
from core.errors import ArtifactError, BadSpec
from core.eval.rows import Example, Row, sent


@dataclass(frozen=True, kw_only=True)
class Pair(Example):
    """A picture and one caption of it. Equal ids, equal content, in whatever datasets."""

    pixels: np.ndarray  # uint8 [H, W, 3], a view of the cache
    image_id: int
    text_id: int


class PairRows:
    """Captions and pictures of one dataset. Raises ArtifactError where the two caches are not of the same rows, BadSpec where
    the pictures have different sizes."""

    def __init__(self, tokens: TokenCache, pictures: PictureCache) -> None:
        picture_of = dict(pictures.rows.tolist())
        missing = [number for number in tokens.row_numbers.tolist() if number not in picture_of]
        if missing:
            raise ArtifactError(f"{len(missing)} rows have no picture in the picture cache, row {missing[0]} first")
        if len(np.unique(pictures.sizes, axis=0)) > 1:
            raise BadSpec("the model's image processor gives pictures of different sizes: it needs a crop, or a fixed size")
        self._tokens = tokens
        self._pictures = pictures
        self._picture_of = [picture_of[number] for number in tokens.row_numbers.tolist()]

    def __len__(self) -> int:
        return len(self._tokens)

    def example(self, number: int) -> tuple[Row, ...]:
        return self._tokens.example(number)

    def pair(self, number: int) -> Pair:
        sequences, index = self._tokens.example(number), self._picture_of[number]
        return Pair(
            sequences,
            pixels=self._pictures.picture(index),
            image_id=_number(bytes(self._pictures.digests[index])),
            text_id=_number(hashlib.sha256(sequences[0][0].astype("<i4").tobytes()).digest()),
        )

    def picture(self, number: int) -> bytes:
        """What is equal for equal pictures."""
        return bytes(self._pictures.digests[self._picture_of[number]])


@dataclass(frozen=True)
class PairBatch:
    """B pairs on the device."""

    pixels: torch.Tensor  # uint8 [B, H, W, 3]
    input_ids: torch.Tensor  # int64 [B, T]; after the end token of a shorter caption stands the end token again
    image_ids: torch.Tensor  # int64 [B]
    text_ids: torch.Tensor  # int64 [B]


@dataclass(frozen=True)
class PairChunks:
    """Up to `rows` pairs at once, in their order: what is encoded together decides memory and no gradient."""

    rows: int

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        return [list(examples[i : i + self.rows]) for i in range(0, len(examples), self.rows)]

    def collate(self, examples: Sequence[Example], device: torch.device) -> PairBatch:
        pairs = [example for example in examples if isinstance(example, Pair)]
        assert len(pairs) == len(examples), "pairs alone are laid out in chunks of pairs"
        captions = [pair.sequences[0][0] for pair in pairs]
        input_ids = np.zeros((len(pairs), max(map(len, captions))), np.int64)
        for row, ids in enumerate(captions):
            input_ids[row, : len(ids)] = ids
            input_ids[row, len(ids) :] = ids[-1]
        return PairBatch(
            pixels=sent(np.stack([pair.pixels for pair in pairs]), device),
            input_ids=sent(input_ids, device),
            image_ids=sent(np.array([pair.image_id for pair in pairs], np.int64), device),
            text_ids=sent(np.array([pair.text_id for pair in pairs], np.int64), device),
        )

    def halved(self, examples: Sequence[Example]) -> "PairChunks | None":
        most = min(self.rows, len(examples))
        return PairChunks(most // 2) if most > 1 else None

    def __str__(self) -> str:
        return f"{self.rows} pairs at once"


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)
