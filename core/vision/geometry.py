"""How features lie on the sphere: alignment and uniformity (Wang and Isola 2020, arXiv 2005.10242), and what of the base is left.

A fall of the loss by uniformity alone (all spread, pairs no nearer) or by alignment alone (all in one place) is the early sign
of a tuning that goes wrong; both are streamed beside the loss. Retention is the third: what the tuned model still does of what
its base did on tasks it was not tuned for.
"""

from collections.abc import Mapping

import torch


@torch.no_grad()
def alignment(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the two sides of a pair, 0 .. 4, less is nearer: an fp64 scalar. Unit features [B, D]."""
    return (images.float() - texts.float()).square().sum(1).mean(dtype=torch.float64)


@torch.no_grad()
def uniformity(features: torch.Tensor, *, block: int = 4096) -> torch.Tensor:
    """log of the mean of exp(-2 · squared distance) over all pairs i < j, 0 (all in one place) to -8: an fp64 scalar.

    Unit features [B, D]. Raises ValueError for fewer than two, which have no distance.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"uniformity is told by distances, and {count} rows have none: two or more are needed")
    features = features.float()
    total = features.new_zeros((), dtype=torch.float64)
    for ours in features.split(block):
        for theirs in features.split(block):
            squared = (2 - 2 * ours @ theirs.T).clamp_(min=0)
            total += squared.mul_(-2).exp_().sum(dtype=torch.float64)
    total -= (2 - 2 * features.square().sum(1)).clamp_(min=0).mul_(-2).exp_().sum(dtype=torch.float64)
    return (total / (count * (count - 1))).log()


def retention(tuned: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """tuned / base of each score, where more is better: 1 is as good as before. A score that was 0 for the base is left out.

    Raises ValueError where the two were not measured alike.
    """
    if tuned.keys() != base.keys():
        raise ValueError(f"scores of one model only: {', '.join(sorted(tuned.keys() ^ base.keys()))}")
    return {name: tuned[name] / base[name] for name in base if base[name] > 0}


@torch.no_grad()
def kept_direction(tuned: torch.Tensor, base: torch.Tensor) -> float:
    """Mean cosine of the features that the tuned model and its base give the same inputs, unit [N, D] each; 1 is unmoved."""
    return float((tuned.float() * base.float()).sum(1).mean())
