"""What a decoder layer computes between its matrix products: norms, gates and rotary turns, and their gradients.

Plain functions of tensors without a gradient of their own: the autograd functions of `projection.py` call them forward and
backward, so that they alone decide what is kept. Each is one pass over its tensors, which is what a kernel makes of it (`gpu`);
in plain torch it is several. Sums and products are in fp32 and rounded once, but for the norm, which rounds
where transformers' own does. N is tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu

from core.models.fp8 import rows_in_8_bits, scaled_in_8_bits, turned_over


def normed(x: torch.Tensor, scale: torch.Tensor, epsilon: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm (arXiv 1910.07467) over the last dimension: (scaled in `dtype`, fp32 1 / root mean square [.., 1])."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (scale * (wide * inverse).to(x.dtype)).to(dtype), inverse


def normed_again(x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `normed` returned, from the inverse that it returned too."""
    return (scale * (x.float() * inverse).to(x.dtype)).to(dtype)


def normed_back(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor, further: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of `normed` by x, in x's dtype; `further` is another gradient of x that is added."""
    unit = x.float() * inverse
    scaled = gradient.float() * scale
    found = inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return (found if further is None else found + further).to(x.dtype)


def normed_back_and_again(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor, further: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`normed_back` and `normed_again`, in the gradient's dtype, in one pass over x."""
    return normed_back(gradient, x, scale, inverse, further), normed_again(x, scale, inverse, gradient.dtype)


def normed_back_scale(gradient: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient of `normed` by its scale, summed over the tokens: fp32, x's shape without the first dimension."""
    return (gradient.float() * (x.float() * inverse)).sum(0)


def gated(both: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """SwiGLU (arXiv 2002.05202): [N, 2 I], gate before up -> silu(gate) * up in `dtype` [N, I]."""
    gate, up = both.float().chunk(2, -1)
    return (silu(gate) * up).to(dtype)


def gate_back_in_place(gradient: torch.Tensor, both: torch.Tensor) -> None:
    """Gradient of `gated`, written over `both`: the largest tensor of a layer, and of no more use. Over `gradient` what `gated`
    returned is written, which its caller needs next."""
    gate, up = both.float().chunk(2, -1)
    wide = gradient.float()
    open_ = torch.sigmoid(gate)
    result, of_both = silu(gate) * up, torch.cat((wide * up * open_ * (1 + gate * (1 - open_)), wide * gate * open_), -1)
    gradient.copy_(result)
    both.copy_(of_both)


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, paired: bool) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864): heads [N, heads, D], cos and sin [N, R / 2]; the first R of D are turned.

    `paired`: a turned pair stands side by side (GLM), else half of R apart (Llama). With -sin it is the gradient.
    """
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    size = 2 * cos.shape[-1]
    part = heads[..., :size].float()
    first, second = (part[..., 0::2], part[..., 1::2]) if paired else part.chunk(2, -1)
    ends = (first * cos - second * sin, second * cos + first * sin)
    whole = torch.stack(ends, -1).flatten(-2) if paired else torch.cat(ends, -1)
    return torch.cat((whole.to(heads.dtype), heads[..., size:]), -1)


def turn_in_place(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, paired: bool) -> None:
    heads.copy_(turned(heads, cos, sin, paired))


def turned_back(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, paired: bool
) -> torch.Tensor:
    """Gradients of turned queries, turned keys and values [N, heads, D] -> of what they were cut from, [N, all heads * D]."""
    straight = [turned(part, cos, -sin, paired) for part in (queries, keys)]
    return torch.cat((*straight, values), 1).flatten(1)


def nats_in_place(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of logits [N, V] at labels [N], fp32 [N]; its gradient by the logits is written over them."""
    wide = logits.float()
    total = torch.logsumexp(wide, -1, keepdim=True)
    is_label = (torch.arange(logits.shape[1], device=logits.device) == labels[:, None]).float()
    nats = total[:, 0] - wide.gather(1, labels[:, None])[:, 0]
    logits.copy_(torch.exp(wide - total) - is_label)
    return nats


@dataclass(frozen=True)
class Elementwise:
    """The functions that a layer uses; a field each, so that kernels can take their place."""

    normed: Callable[..., Any] = normed
    normed_again: Callable[..., Any] = normed_again
    normed_back: Callable[..., Any] = normed_back
    normed_back_and_again: Callable[..., Any] = normed_back_and_again
    normed_back_scale: Callable[..., Any] = normed_back_scale
    gated: Callable[..., Any] = gated
    gate_back_in_place: Callable[..., Any] = gate_back_in_place
    turn_in_place: Callable[..., Any] = turn_in_place
    turned_back: Callable[..., Any] = turned_back
    nats_in_place: Callable[..., Any] = nats_in_place
    rows_in_8_bits: Callable[..., Any] = rows_in_8_bits
    scaled_in_8_bits: Callable[..., Any] = scaled_in_8_bits
    turned_over: Callable[..., Any] = turned_over


PLAIN = Elementwise()
