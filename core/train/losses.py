"""Training losses: one function per objective, (model, micro-batch, objective) -> (sum of losses, number of terms).

A sum, not a mean: the loop divides by the terms of the *whole* step, so that a step of eight rows has the same gradient
whether it is cut into one micro-batch or eight (a mean of means weighs short answers more).
"""

from typing import Any

import torch

from core.eval.nats import trained_nats
from core.eval.rows import MicroBatch
from core.spec import SftObjective


def sft_loss(model: Any, batch: MicroBatch, objective: SftObjective) -> tuple[torch.Tensor, int]:
    """(summed nats fp32, trained tokens): next-token cross-entropy on the tokens whose mask is 1."""
    nats, _ = trained_nats(model, batch)
    return nats.sum(), batch.trained_tokens


LOSSES = {"sft": sft_loss}
"""Kind of an objective (core.spec) -> its loss."""
