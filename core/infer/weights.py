"""Probabilities as whole numbers, and what sampling asks of them: thresholds and one draw.

Sums of floats depend on the order they are added in, which kernels choose by the batch's shape; a candidate at the border of
top_p, or a draw at the border of two tokens, would then fall either way. Sums of integers don't. And a threshold is found by
counting into buckets, where sorting a vocabulary would cost more than a small model's step.
"""

import torch
from torch.nn.functional import pad

ONE = 2**40
"""Weight of a row's best token. A vocabulary of 2**22 of them still adds up within 63 bits; below 2**-40 of it is 0."""

_BUCKETS = 1 << 10
_BLOCK = 512


def weights_of(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, weights) of scores [N, V] in nats below each row's best: exp, as ordered int32 keys below 2**30 and as int64
    weights, truncated. NaN is 0. Overwrites `scores`."""
    shares = scores.exp_().nan_to_num_(0.0)
    # The bits of floats that are not negative are ordered as the floats are.
    keys = shares.view(torch.int32).clone()
    return keys, shares.mul_(ONE).long()


def largest_key(keys: torch.Tensor, amounts: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[N]: the largest key at and above which a row's `amounts` [N, V] add up to `wanted` [N]; 0 where they never do.

    Ten bits of the key at a time, from the top: of each bucket the sum, the bucket where what is wanted is reached, and what
    is wanted of it then.
    """
    found = torch.zeros_like(wanted)
    for shift in (20, 10, 0):
        index = _BUCKETS - 1 - (keys >> shift & _BUCKETS - 1)
        sums = amounts.new_zeros(len(amounts), _BUCKETS).scatter_add_(1, index.long(), amounts)
        upto = sums.cumsum(1)
        at = (upto < wanted[:, None]).sum(1, keepdim=True).clamp(max=_BUCKETS - 1)
        wanted = wanted - (upto - sums).gather(1, at)[:, 0]
        found = found * _BUCKETS + _BUCKETS - 1 - at[:, 0]
        amounts = amounts.where(index == at, 0)
    return found


def pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[N]: the token whose share of the row's sum of `weights` [N, V] the number in [0, 1) falls into, in order of ids.

    One without weight is never picked while another has some. In two stages, since a scan along one long row is slow.
    """
    blocks = pad(weights, (0, -weights.shape[1] % _BLOCK)).view(len(weights), -1, _BLOCK)
    sums = blocks.sum(-1)
    upto = sums.cumsum(1)
    # Rounded up to the total by the product, it would fall behind the last token.
    target = torch.minimum((uniform * upto[:, -1].double()).long(), upto[:, -1] - 1)[:, None]
    block = (upto <= target).sum(1, keepdim=True).clamp(max=blocks.shape[1] - 1)
    target = target - (upto - sums).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].cumsum(1)
    return block[:, 0] * _BLOCK + (inside <= target).sum(1)
