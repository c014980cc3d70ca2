"""SwiGLU and its way back, in one pass over its tensors each. The way back writes over what it reads: gate and up are the largest
tensor of a layer, and torch.compile would hold it twice. N is tokens.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024
"""Numbers of a program."""


@triton.jit
def _gated(both, result, width, block: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    is_there = column < width
    gate = tl.load(both + row * 2 * width + column, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, mask=is_there, other=0.0).to(tl.float32)
    found = gate * tl.sigmoid(gate) * up
    tl.store(result + row * width + column, found.to(result.dtype.element_ty), mask=is_there)


def gated(both: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `elementwise.gated`; `both` contiguous."""
    assert both.is_contiguous()
    count, width = len(both), both.shape[1] // 2
    result = both.new_empty(count, width, dtype=dtype)
    _gated[(count, triton.cdiv(width, _BLOCK))](both, result, width, block=_BLOCK)
    return result


@triton.jit
def _gate_back(gradient, both, width, block: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    is_there = column < width
    of_gate = both + row * 2 * width + column
    of_up, of_result = of_gate + width, gradient + row * width + column
    gate = tl.load(of_gate, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(of_up, mask=is_there, other=0.0).to(tl.float32)
    wide = tl.load(of_result, mask=is_there, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    passed = gate * open_
    kind = both.dtype.element_ty
    tl.store(of_gate, (wide * up * open_ * (1 + gate * (1 - open_))).to(kind), mask=is_there)
    tl.store(of_up, (wide * passed).to(kind), mask=is_there)
    tl.store(of_result, (passed * up).to(gradient.dtype.element_ty), mask=is_there)


def gate_back_in_place(gradient: torch.Tensor, both: torch.Tensor) -> None:
    """As `elementwise.gate_back_in_place`, both contiguous."""
    assert gradient.is_contiguous()
    assert both.is_contiguous()
    count, width = gradient.shape
    _gate_back[(count, triton.cdiv(width, _BLOCK))](gradient, both, width, block=_BLOCK)
