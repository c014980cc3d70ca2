"""Token rows as the tensors of one forward pass.

Padding is told by length, never by an id, so that an end-of-turn token that doubles as the padding token keeps its loss. It
is on the right, where a causal model cannot see it from a real position: no attention mask is needed, and attention takes
its fastest path. Packed rows have no padding at all: they lie end to end in one line, positions start anew with each, and
the attention of `core.models.documents` keeps them apart.

All that a pass has to know of its rows is worked out here, on the host: a GPU that were asked for it would have to finish its
work first, in every micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Row = tuple[np.ndarray, np.ndarray]
"""(token ids int32 [T], loss mask uint8 [T]); a mask of 1 means the token at that place is predicted and trained on."""


@dataclass(frozen=True)
class Example:
    """What is trained on as one: a single row, or the pair (chosen, rejected) of a preference."""

    sequences: tuple[Row, ...]
    reference: tuple[float, ...] = ()
    """Summed log-probability of each sequence under the frozen reference, where the objective has one."""

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.sequences)

    @property
    def longest(self) -> int:
        return max(len(ids) for ids, _ in self.sequences)

    @property
    def trained_tokens(self) -> int:
        return sum(trained_tokens(row) for row in self.sequences)


@dataclass(frozen=True)
class Documents:
    """Where the rows of a packed line begin and end."""

    position_ids: torch.Tensor  # int64 [1, N]
    bounds: torch.Tensor  # int32 [S + 1], on the device: row s is bounds[s] .. bounds[s + 1]
    longest: int

    def attention_arguments(self) -> dict[str, Any]:
        """What a decoder's forward passes down to its attention; the names are transformers' own for packed rows."""
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


@dataclass(frozen=True)
class MicroBatch:
    """E examples of S sequences. Padded: B = S lines of T tokens, the longest's. Packed: B = 1 line of T = all tokens."""

    input_ids: torch.Tensor  # int64 [B, T]
    labels: torch.Tensor  # int64 [N]: the tokens that carry loss, from first to last
    place: torch.Tensor  # int64 [N]: where each is predicted, the place before its own; counted over all lines, 0 .. B * T - 1
    sequence: torch.Tensor  # int64 [N]: the sequence each stands in, 0 .. S - 1
    counts: torch.Tensor  # int64 [S]: how many each sequence has
    examples: int
    sequences: int
    reference: torch.Tensor | None  # fp32 [S], as in Example
    documents: Documents | None  # None when padded
    tokens: int  # without padding
    trained_tokens: int  # labels that count: the first place of a sequence has nothing before it and never does


def collate_padded(examples: Sequence[Example], device: torch.device) -> MicroBatch:
    rows = [row for example in examples for row in example.sequences]
    longest = max(len(ids) for ids, _ in rows)
    input_ids = np.zeros((len(rows), longest), np.int64)
    trained = np.zeros((len(rows), longest), bool)
    for number, (ids, mask) in enumerate(rows):
        input_ids[number, : len(ids)] = ids
        trained[number, : len(ids)] = mask != 0
    trained[:, 0] = False
    sequence = np.repeat(np.arange(len(rows))[:, None], longest, axis=1)
    return _batch(examples, input_ids, trained, sequence, None, device)


def collate_packed(examples: Sequence[Example], device: torch.device) -> MicroBatch:
    rows = [row for example in examples for row in example.sequences]
    lengths = [len(ids) for ids, _ in rows]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    input_ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
    trained = np.concatenate([mask for _, mask in rows]) != 0
    trained[bounds[:-1]] = False  # what the row before would have to predict
    positions = np.concatenate([np.arange(length) for length in lengths])
    documents = Documents(
        position_ids=sent(positions[None], device),
        bounds=sent(bounds, device),
        longest=max(lengths),
    )
    sequence = np.repeat(np.arange(len(rows)), lengths)
    return _batch(examples, input_ids[None], trained[None], sequence[None], documents, device)


def trained_tokens(row: Row) -> int:
    """Tokens of a row that carry loss."""
    return int(np.count_nonzero(row[1][1:]))


def sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on a device; nobody waits for the copy."""
    tensor = torch.from_numpy(array)
    # Out of pageable memory a copy waits for all that the GPU has to do before it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _batch(
    examples: Sequence[Example],
    input_ids: np.ndarray,
    trained: np.ndarray,
    sequence: np.ndarray,
    documents: Documents | None,
    device: torch.device,
) -> MicroBatch:
    reference = np.array([value for example in examples for value in example.reference], np.float32)
    sequences = sum(len(example.sequences) for example in examples)
    own_place = np.flatnonzero(trained)
    stands_in = sequence.reshape(-1)[own_place]
    return MicroBatch(
        input_ids=sent(input_ids, device),
        labels=sent(input_ids.reshape(-1)[own_place], device),
        place=sent(own_place - 1, device),
        sequence=sent(stands_in, device),
        counts=sent(np.bincount(stands_in, minlength=sequences), device),
        examples=len(examples),
        sequences=sequences,
        reference=sent(reference, device) if len(reference) else None,
        documents=documents,
        tokens=sum(example.tokens for example in examples),
        trained_tokens=len(own_place),
    )
