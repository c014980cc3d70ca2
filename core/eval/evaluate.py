"""One pass over the held-out examples: what the model would have to pay for answers it was never trained on.

Only measures; which examples are held out is decided by `core.train.batches`, what a loss is by the objective.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from core.eval.layout import Layout
from core.eval.rows import Example, MicroBatch


class ExampleLosses(Protocol):
    """What an objective's loss returns for E examples (core.train.losses)."""

    @property
    def sums(self) -> torch.Tensor: ...

    @property
    def terms(self) -> torch.Tensor: ...

    @property
    def curves(self) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Measured:
    """The held-out examples, in order."""

    losses: list[tuple[float, int]]  # (summed loss, terms)
    curves: dict[str, float]  # means over the examples

    @property
    def terms(self) -> int:
        return sum(terms for _, terms in self.losses)

    @property
    def loss(self) -> float:
        return sum(total for total, _ in self.losses) / self.terms


@torch.no_grad()
def evaluate(
    model: Any,
    examples: Sequence[Example],
    *,
    loss: Callable[[Any, MicroBatch], ExampleLosses],
    layout: Layout,
    device: torch.device,
    compute: Callable[[], AbstractContextManager[Any]],
) -> Measured:
    """`compute` gives the context of a forward pass, as in training. The model's mode is put back as it was found."""
    was_training = model.training
    model.eval()
    losses: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    curves: dict[str, float] = {}
    places = {id(example): number for number, example in enumerate(examples)}
    try:
        for micro_batch in layout.split(examples):
            with compute():
                found = loss(model, layout.collate(micro_batch, device))
            sums, terms = found.sums.tolist(), found.terms.tolist()
            for example, total, count in zip(micro_batch, sums, terms, strict=True):
                losses[places[id(example)]] = (total, count)
            for name, values in found.curves.items():
                curves[name] = curves.get(name, 0.0) + float(values.sum()) / len(examples)
    finally:
        model.train(was_training)
    return Measured(losses, curves)
