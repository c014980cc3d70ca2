"""Layout: how examples are cut into micro-batches and laid out in memory. Padded rows, or rows packed end to end.

A layout decides memory and speed and nothing else: whatever it cuts, the loop divides by the terms of the whole step, so
gradient and loss stay those of the step. Both kinds are bounded by the same thing, micro_batch_size × max_length tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from core.eval.rows import Example, MicroBatch, collate_packed, collate_padded


class Layout(Protocol):
    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The examples of one step as micro-batches."""
        ...

    def collate(self, examples: Sequence[Example], device: torch.device) -> Any:
        """A MicroBatch, or what a loss takes that is not of text alone."""
        ...

    def halved(self, examples: Sequence[Example]) -> "Layout | None":
        """The same with half as much in memory at once as this step had; None when that can't be."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Padded:
    """Up to `rows` examples at once, each padded to the longest of them; like lengths together, the longest first."""

    rows: int

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        ordered = sorted(examples, key=lambda example: -example.longest)
        return [ordered[i : i + self.rows] for i in range(0, len(ordered), self.rows)]

    def collate(self, examples: Sequence[Example], device: torch.device) -> MicroBatch:
        return collate_padded(examples, device)

    def halved(self, examples: Sequence[Example]) -> "Padded | None":
        most = min(self.rows, len(examples))
        return Padded(most // 2) if most > 1 else None

    def __str__(self) -> str:
        return f"{self.rows} padded rows at once"


@dataclass(frozen=True)
class Packed:
    """Up to `tokens` tokens at once, without padding. An example longer than that stands alone."""

    tokens: int

    def split(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Best fit, the longest first: each example goes where the least room is left that still holds it."""
        bins: list[list[Example]] = []
        room: list[int] = []
        for example in sorted(examples, key=lambda example: -example.tokens):
            fitting = [number for number, left in enumerate(room) if left >= example.tokens]
            if fitting:
                best = min(fitting, key=lambda number: room[number])
                bins[best].append(example)
                room[best] -= example.tokens
            else:
                bins.append([example])
                room.append(self.tokens - example.tokens)
        return bins

    def collate(self, examples: Sequence[Example], device: torch.device) -> MicroBatch:
        return collate_packed(examples, device)

    def halved(self, examples: Sequence[Example]) -> "Packed | None":
        # Of what was there, which may be far below what might have been.
        most = max(sum(example.tokens for example in part) for part in self.split(examples))
        longest = max(example.tokens for example in examples)
        return Packed(max(most // 2, longest)) if most > longest else None

    def __str__(self) -> str:
        return f"{self.tokens} packed tokens at once"
