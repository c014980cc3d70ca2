"""One token for each row of logits, in one Triton kernel: greedy or drawn, with a temperature and min_p.

What `core/infer/sampling.py` computes, by the same whole numbers; where the two exponentials differ in a last bit, a draw at the
very border of two tokens may fall the other way. So it is a row's own settings alone that decide which of the two draws it.
A program reads its row two or three times, out of the cache it was just written to: 32 rows of a vocabulary of 128,256 are 8 MB
in bf16. One launch instead of some thirty is what counts: the host launches the next step meanwhile.
"""

import torch
import triton
import triton.language as tl

from core.infer.weights import ONE

_BLOCK = 8192
SETTINGS = 4
"""Numbers that a row is given: where it stands, temperature (0 is greedy), min_p, chance in [0, 1)."""


@triton.jit
def _weights(shares, one: tl.constexpr):
    return (tl.where(shares == shares, shares, 0.0) * one).to(tl.int64)


@triton.jit(do_not_specialize=["width"])
def _draw(logits, settings, told, vocabulary, width, one: tl.constexpr, given: tl.constexpr, block: tl.constexpr):
    mine = settings + tl.program_id(0) * given
    row = tl.load(mine).to(tl.int64)
    temperature, min_p, chance = tl.load(mine + 1), tl.load(mine + 2), tl.load(mine + 3)
    start_of_row = logits + row * vocabulary
    lane = tl.arange(0, block)
    best = tl.full([block], -float("inf"), tl.float32)
    index = tl.zeros([block], tl.int32)
    broken = tl.zeros([block], tl.int32)
    for start in range(0, vocabulary, block):
        column = start + lane
        x = tl.load(start_of_row + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        is_more = x > best
        best = tl.where(is_more, x, best)
        index = tl.where(is_more, column, index)
        broken = tl.where(x == x, broken, 1)
    peak = tl.max(best, 0)
    token = tl.min(tl.where(best == peak, index, vocabulary - 1), 0)
    is_finite = (tl.max(broken, 0) == 0) & (peak < float("inf")) & (peak > -float("inf"))
    totals = tl.zeros([block], tl.int64)
    for start in range(0, vocabulary, block):
        column = start + lane
        x = tl.load(start_of_row + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        totals += _weights(tl.exp(x - peak), one)
    if temperature > 0:
        heat = tl.full([block], 0.0, tl.float32) + temperature.to(tl.float32)
        least = (min_p * one).to(tl.int64)
        sums = tl.zeros([block], tl.int64)
        for start in range(0, vocabulary, block):
            column = start + lane
            x = tl.load(start_of_row + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
            weights = _weights(tl.exp(tl.div_rn(x - peak, heat)), one)
            sums += tl.where(weights >= least, weights, 0)
        total = tl.sum(sums, 0)
        target = tl.minimum((chance * total.to(tl.float64)).to(tl.int64), total - 1)
        before = total - total
        for start in range(0, vocabulary, block):
            column = start + lane
            x = tl.load(start_of_row + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
            weights = _weights(tl.exp(tl.div_rn(x - peak, heat)), one)
            weights = tl.where(weights >= least, weights, 0)
            inside = tl.sum(weights, 0)
            if (before <= target) & (target < before + inside):
                token = start + tl.sum((tl.cumsum(weights, 0) + before <= target).to(tl.int32), 0)
            before += inside
    share = tl.sum(totals, 0).to(tl.float64) / one
    chosen = tl.load(start_of_row + token).to(tl.float64)
    out = told + row * width
    tl.store(out, token.to(tl.float64))
    tl.store(out + 1, chosen - (peak.to(tl.float64) + tl.log(share)))
    tl.store(out + 2, is_finite.to(tl.float64))


def draw_rows(logits: torch.Tensor, settings: torch.Tensor, told: torch.Tensor) -> None:
    """Of the rows of `logits` [N, V], contiguous, that `settings` float64 [S, 4] names: token, its log-probability (nats, of the
    raw logits) and whether the row's logits are finite, into the first places of the row of `told` float64 [N, n]."""
    _draw[(len(settings),)](
        logits, settings, told, logits.shape[1], told.shape[1], one=float(ONE), given=SETTINGS, block=_BLOCK, num_warps=16
    )
