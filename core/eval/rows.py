"""Token rows as padded tensors.

Padding is told by length, never by an id, so that an end-of-turn token that doubles as the padding token keeps its loss. It
is on the right, where a causal model cannot see it from a real position: no attention mask is needed, and attention takes
its fastest path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Row = tuple[np.ndarray, np.ndarray]
"""(token ids int32 [T], loss mask uint8 [T]); a mask of 1 means the token at that place is predicted and trained on."""

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """B rows, padded to the longest of them, T."""

    input_ids: torch.Tensor  # int64 [B, T]
    labels: torch.Tensor  # int64 [B, T]; IGNORED where no loss is taken. labels[:, t] belongs to the prediction made at t - 1
    tokens: int  # without padding
    trained_tokens: int  # labels that count: position 0 has nothing before it and never does


def collate(rows: Sequence[Row], device: torch.device) -> MicroBatch:
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    for number, (ids, mask) in enumerate(rows):
        row = torch.from_numpy(ids.astype(np.int64))
        input_ids[number, : len(row)] = row
        labels[number, : len(row)] = torch.where(torch.from_numpy(mask.astype(bool)), row, IGNORED)
    labels[:, 0] = IGNORED
    return MicroBatch(
        input_ids=input_ids.to(device),
        labels=labels.to(device),
        tokens=sum(len(ids) for ids, _ in rows),
        trained_tokens=int((labels != IGNORED).sum()),
    )


def trained_tokens(row: Row) -> int:
    """Tokens of a row that carry loss."""
    return int(np.count_nonzero(row[1][1:]))
