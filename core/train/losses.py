"""Training losses: one function per objective, (model, micro-batch, objective) -> a loss for each example, in parts.

Sums, not means: the loop divides by the terms of the *whole* step, so that a step of eight rows has the same gradient
whether it is cut into one micro-batch or eight (a mean of means weighs short answers more). The same functions measure the
held-out examples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid, relu

from core.eval.nats import trained_nats
from core.eval.rows import Example, MicroBatch
from core.spec import DpoObjective, OrpoObjective, PlainTextObjective, SftObjective


class ExampleLosses(NamedTuple):
    """Losses of E examples. The loss of a step is the sum of `sums` over the sum of `terms`."""

    sums: torch.Tensor  # fp32 [E], with a gradient
    terms: torch.Tensor  # int64 [E]: trained tokens, or 1 where an example is one term
    curves: dict[str, torch.Tensor]  # fp32 [E] each, without a gradient; a step reports their means


@dataclass(frozen=True)
class Loss:
    """How an objective is computed, and what it needs."""

    function: Callable[[Any, MicroBatch, Any], ExampleLosses]
    per_token: bool
    """A term is a trained token; otherwise an example."""
    needs_reference: bool = False

    def terms(self, examples: list[Example]) -> int:
        """Terms of a step, known before its first forward pass."""
        return sum(example.trained_tokens for example in examples) if self.per_token else len(examples)


def token_loss(model: Any, batch: MicroBatch, objective: SftObjective | PlainTextObjective) -> ExampleLosses:
    """Next-token cross-entropy in nats on the tokens whose mask is 1."""
    sums, counts = _by_sequence(model, batch)
    return ExampleLosses(sums, counts, {})


def dpo_loss(model: Any, batch: MicroBatch, objective: DpoObjective) -> ExampleLosses:
    """DPO (arXiv 2305.18290, eq. 7; with label_smoothing cDPO), SLiC's hinge, or IPO (2310.12036, eq. 17, per token)."""
    sums, counts = _by_sequence(model, batch)
    assert batch.reference is not None
    gains = -sums - batch.reference  # log-probability won over the reference
    if objective.loss == "ipo":
        gains = gains / counts
    chosen, rejected = gains.view(-1, 2).unbind(1)
    margin = chosen - rejected
    if objective.loss == "sigmoid":
        smoothing = objective.label_smoothing
        scaled = objective.beta * margin
        losses = -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
    elif objective.loss == "hinge":
        losses = relu(1 - objective.beta * margin)
    else:
        losses = (margin - 1 / (2 * objective.beta)) ** 2
    return _pairs(losses, objective.beta * margin)


def orpo_loss(model: Any, batch: MicroBatch, objective: OrpoObjective) -> ExampleLosses:
    """ORPO (arXiv 2403.07691, eqs. 6 and 7): mean nats of the chosen answer, and the log odds ratio of the two answers.

    The likelihood of an answer is the geometric mean over its tokens, as in the paper.
    """
    sums, counts = _by_sequence(model, batch)
    means = -sums / counts
    chosen, rejected = (means - _log1mexp(means)).view(-1, 2).unbind(1)
    margin = chosen - rejected
    return _pairs(-means.view(-1, 2)[:, 0] - objective.beta * logsigmoid(margin), margin)


LOSSES: dict[str, Loss] = {
    "sft": Loss(token_loss, per_token=True),
    "plain_text": Loss(token_loss, per_token=True),
    "dpo": Loss(dpo_loss, per_token=False, needs_reference=True),
    "orpo": Loss(orpo_loss, per_token=False),
}
"""Kind of an objective (core.spec) -> its loss."""


def sequence_nats(model: Any, batch: MicroBatch) -> torch.Tensor:
    """fp32 [S]: the summed nats of each sequence's trained tokens."""
    return _by_sequence(model, batch)[0]


def _by_sequence(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed nats fp32 [S], trained tokens int64 [S])."""
    nats, sequence = trained_nats(model, batch)
    sums = nats.new_zeros(batch.sequences).index_add(0, sequence, nats)
    return sums, batch.counts


def _pairs(losses: torch.Tensor, margin: torch.Tensor) -> ExampleLosses:
    margin = margin.detach()
    curves = {"reward_accuracy": (margin > 0).float(), "reward_margin": margin}
    return ExampleLosses(losses, torch.ones(len(losses), dtype=torch.int64, device=losses.device), curves)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012)."""
    x = x.clamp(max=-1e-7)  # a token of probability 1 has infinite odds
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
