"""Did the demo's job do what it should? Pure functions from recorded events to checks; no network, no printing.

The held-out loss is nats per trained token, a ratio of sums over rows. Its drop and the standard error of the drop are
those of the ratio estimator over paired rows (Cochran, *Sampling Techniques*, 3rd ed., 6.4). With dᵢ the nats that row i
lost between the two evaluations, tᵢ its trained tokens, n rows:

    drop = Σ dᵢ / Σ tᵢ
    se   = sqrt( n / (n − 1) · Σ (dᵢ − drop · tᵢ)² ) / Σ tᵢ

Pairing removes what rows have in common before and after (some are hard, some are long), which is most of the spread.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_STEPS = 60
MIN_TOKENS = 15_000
MIN_HELD_OUT_ROWS = 32
MIN_DROP_NATS = 0.05
MIN_DROP_IN_ERRORS = 2.0

RowLoss = tuple[float, int]
"""(summed nats, trained tokens) of one held-out row."""


@dataclass(frozen=True)
class Check:
    claim: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Drop:
    """Nats per trained token, with the paired standard error of the difference."""

    before: float
    after: float
    drop: float
    standard_error: float
    rows: int


def paired_drop(before: Sequence[RowLoss], after: Sequence[RowLoss]) -> Drop:
    """The drop between two evaluations of the same rows. Raises ValueError when they are not the same rows."""
    if [tokens for _, tokens in before] != [tokens for _, tokens in after]:
        raise ValueError("the two evaluations are not over the same rows: their trained tokens differ")
    if len(before) < 2:
        raise ValueError(f"a standard error needs two held-out rows or more; there are {len(before)}")
    tokens = sum(count for _, count in before)
    differences = [old - new for (old, _), (new, _) in zip(before, after, strict=True)]
    drop = sum(differences) / tokens
    squares = sum((d - drop * count) ** 2 for d, (_, count) in zip(differences, before, strict=True))
    n = len(before)
    return Drop(
        before=sum(nats for nats, _ in before) / tokens,
        after=sum(nats for nats, _ in after) / tokens,
        drop=drop,
        standard_error=math.sqrt(n / (n - 1) * squares) / tokens,
        rows=n,
    )


def training_checks(events: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Checks over a job's events (`kind`, `data`), oldest first. A step that was run twice counts once."""
    steps = {event["data"]["step"]: event["data"] for event in events if event["kind"] == "step"}
    tokens = sum(step["tokens"] for step in steps.values())
    checks = [
        Check(f"{MIN_STEPS} optimizer steps or more", len(steps) >= MIN_STEPS, f"{len(steps)}"),
        Check(f"{MIN_TOKENS:,} tokens or more", tokens >= MIN_TOKENS, f"{tokens:,}"),
    ]
    evaluations = [event["data"] for event in events if event["kind"] == "eval"]
    if len(evaluations) < 2:
        return [*checks, Check("held-out loss before and after training", False, f"{len(evaluations)} evaluations")]
    before, after = ([(nats, count) for nats, count in one["row_losses"]] for one in (evaluations[0], evaluations[-1]))
    drop = paired_drop(before, after)
    return [
        *checks,
        Check(f"{MIN_HELD_OUT_ROWS} held-out rows or more", drop.rows >= MIN_HELD_OUT_ROWS, f"{drop.rows}"),
        Check(
            f"held-out loss falls by {MIN_DROP_NATS} nats per token or more",
            drop.drop >= MIN_DROP_NATS,
            f"{drop.before:.3f} -> {drop.after:.3f}, by {drop.drop:.3f}",
        ),
        Check(
            f"by more than {MIN_DROP_IN_ERRORS:g} paired standard errors",
            drop.drop > MIN_DROP_IN_ERRORS * drop.standard_error,
            f"standard error {drop.standard_error:.4f}",
        ),
    ]


def answers_check(answers: Sequence[tuple[str, str, str]]) -> Check:
    """`answers` holds (question, the base's answer, the adapter's answer)."""
    different = sum(base != adapter for _, base, adapter in answers)
    return Check("base and adapter answer differently", different > 0, f"{different} of {len(answers)} answers differ")
