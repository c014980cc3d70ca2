"""Accuracy of "does this caption belong to this picture?", told apart by the true answer.

Three pairs in a batch of image-text matching are one true and two false, so a model that always says no is right two times in
three: the balanced accuracy, the mean of both shares, makes that a half.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MatchingAccuracy:
    accuracy: float  # 0 .. 1 of all pairs
    balanced: float | None  # mean of the shares of true and of false pairs told rightly; None where there is one kind only


def matching_accuracy(said: Sequence[bool], true: Sequence[bool]) -> MatchingAccuracy:
    """Raises ValueError for no pairs, or not as many of both."""
    if not said or len(said) != len(true):
        raise ValueError(f"{len(said)} verdicts on {len(true)} pairs can't be scored")
    right = {kind: [a == b for a, b in zip(said, true, strict=True) if b == kind] for kind in (True, False)}
    shares = [sum(hits) / len(hits) for hits in right.values() if hits]
    hits = sum(map(sum, right.values()))
    return MatchingAccuracy(hits / len(said), sum(shares) / 2 if len(shares) == 2 else None)
