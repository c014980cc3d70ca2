"""Cross-entropy of rows of logits with its gradient written over them: one program a row, which reads it twice, the second time
out of the cache."""

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _nats(logits, labels, nats, width, stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    most = tl.full([block], -float("inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        some = tl.load(logits + row * stride + start + column, mask=start + column < width, other=-float("inf")).to(tl.float32)
        highest = tl.maximum(most, some)
        # Where there was nothing yet both are -inf, whose difference is no number.
        total = tl.where(highest > -float("inf"), total * tl.exp(most - highest) + tl.exp(some - highest), 0.0)
        most = highest
    peak = tl.max(most, 0)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(most - peak), 0))
    label = tl.load(labels + row)
    tl.store(nats + row, log_sum - tl.load(logits + row * stride + label).to(tl.float32))
    tl.debug_barrier()  # the label's logit is read before any thread writes over it
    for start in range(0, width, block):
        at = start + column
        some = tl.load(logits + row * stride + at, mask=at < width, other=-float("inf")).to(tl.float32)
        found = tl.exp(some - log_sum) - tl.where(at == label, 1.0, 0.0)
        tl.store(logits + row * stride + at, found.to(logits.dtype.element_ty), mask=at < width)


def nats_in_place(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `elementwise.nats_in_place`."""
    assert logits.stride(1) == 1
    nats = logits.new_empty(len(logits), dtype=torch.float32)
    _nats[(len(logits),)](logits, labels, nats, logits.shape[1], logits.stride(0), block=_BLOCK, num_warps=8)
    return nats
