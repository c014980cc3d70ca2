"""One pass over the held-out rows: what the model would have to pay, in nats, for answers it was never trained on.

Only measures; which rows are held out is decided by `core.train.batches`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from core.eval.nats import trained_nats
from core.eval.rows import Row, collate


@torch.no_grad()
def evaluate_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    micro_batch_size: int,
    device: torch.device,
    compute: Callable[[], AbstractContextManager[Any]],
) -> list[tuple[float, int]]:
    """Per row, in order: (summed nats, trained tokens). `compute` gives the context of a forward pass, as in training.

    Rows are grouped by length to save padding. The model's mode is put back as it was found.
    """
    was_training = model.training
    model.eval()
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
    try:
        for first in range(0, len(order), micro_batch_size):
            numbers = order[first : first + micro_batch_size]
            batch = collate([rows[number] for number in numbers], device)
            with compute():
                nats, row = trained_nats(model, batch)
            sums = torch.zeros(len(numbers), device=device).index_add_(0, row, nats).tolist()
            counts = torch.bincount(row, minlength=len(numbers)).tolist()
            for number, total, count in zip(numbers, sums, counts, strict=True):
                results[number] = (total, count)
    finally:
        model.train(was_training)
    return results
