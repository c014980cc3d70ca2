"""Captions as token rows: what of them is trained on, and those with nothing to train on.

A caption of special tokens alone (an empty text, a lone emoji that a vocabulary lacks) has a loss all the same: that of its end
token. It teaches a model to say nothing, and a matcher that nothing fits everything, so it is refused, by row.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import BadData

IGNORED = -100
"""The label of a place that carries no loss."""

_NAMED_ROWS = 10


def wordless(captions: Sequence[Sequence[int]], special: Collection[int]) -> list[int]:
    """Numbers, from 1, of the captions all of whose tokens are in `special`: start, end, padding, and the unknown token."""
    return [number for number, ids in enumerate(captions, start=1) if all(token in special for token in ids)]


@dataclass(frozen=True)
class CaptionRows:
    """B captions of at most T tokens."""

    input_ids: np.ndarray  # int64 [B, T], padded on the right
    attention_mask: np.ndarray  # int64 [B, T], 1 where a caption is
    labels: np.ndarray  # int64 [B, T], IGNORED on the prompt and on padding; not shifted, as transformers takes them


def collate_captions(captions: Sequence[Sequence[int]], *, prompt_tokens: int, pad: int, special: Collection[int]) -> CaptionRows:
    """Of token ids with the special tokens around them; the first `prompt_tokens` of each ("a picture of") carry no loss.

    Padding is told by length, so that a padding token that doubles as the end keeps its loss there. Raises BadData naming the
    captions, from 1, that have no word after their prompt.
    """
    if not captions:
        raise BadData("there is no caption to train on")
    if empty := wordless([ids[prompt_tokens:] for ids in captions], special):
        named = ", ".join(map(str, empty[:_NAMED_ROWS])) + (", …" if len(empty) > _NAMED_ROWS else "")
        raise BadData(
            f"{len(empty)} of {len(captions)} captions have no word, special tokens aside: number {named}. "
            "Give each a text, or leave its row out"
        )
    longest = max(map(len, captions))
    input_ids = np.full((len(captions), longest), pad, np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, ids in enumerate(captions):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    labels = np.where(attention_mask == 1, input_ids, IGNORED)
    labels[:, :prompt_tokens] = IGNORED
    return CaptionRows(input_ids, attention_mask, labels)
