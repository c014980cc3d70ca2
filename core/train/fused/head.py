"""The loss of a frozen output head, with its gradient made in the same pass.

A token's loss has a gradient by the hidden state that is known as soon as its logits are: softmax minus one at the label, times
the head. Whatever comes back later only scales it. So logits are made once, a chunk at a time, and nothing of them is kept:
neither they nor a log-softmax wait for the backward pass, and none is made again. N is tokens, V the vocabulary.
"""

from typing import Any

import torch
from torch.nn.functional import linear

from core.train.fused.elementwise import Elementwise

LOGITS_AT_ONCE = 1 << 25
"""64 MiB in bf16: 1,048 tokens of a vocabulary of 32,000, 220 of 152,000; with fewer, reading the weight would take longer."""


class FusedHead:
    """Nats of a linear head whose weight does not train."""

    def __init__(self, head: torch.nn.Linear, ops: Elementwise) -> None:
        self._head, self._ops = head, ops

    def nats(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden [N, H], labels [N] -> fp32 [N], with a way back to hidden."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        found: torch.Tensor = _Nats.apply(self._head, self._ops, dtype, hidden, labels)
        return found


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: torch.nn.Linear, ops: Elementwise, dtype: torch.dtype, hidden: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        weight = head.weight.detach().to(dtype)
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        hidden = hidden.detach()
        rows = max(1, LOGITS_AT_ONCE // len(weight))
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden, dtype=dtype)
        for part, wanted, found, of_part in zip(*(t.split(rows) for t in (hidden, labels, nats, gradient)), strict=True):
            logits = linear(part.to(dtype), weight, bias)
            found.copy_(ops.nats_in_place(logits, wanted))
            torch.mm(logits, weight, out=of_part)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (of_hidden,) = ctx.saved_tensors
        return None, None, None, (of_hidden * gradient[:, None]).to(ctx.dtype), None
