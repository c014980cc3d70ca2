"""Element-wise functions of a layer that write over what they read, as kernels of NVIDIA GPUs in Triton.

torch.compile would write to fresh memory first and copy it back: one and a half times the bytes, and for a gate the largest
tensor of a layer a second time. Each thread stores only where it alone has loaded. N is tokens, D a head's size.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from core.train.fused.elementwise import Elementwise, compiled

_BLOCK = 1024
"""Numbers of a program."""


def for_gpu() -> Elementwise:
    """What is written over by the kernels here, all else by torch.compile's."""
    return replace(compiled(), gate_back_in_place=gate_back_in_place, turn_in_place=turn_in_place, turned_back=turned_back)


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


@triton.jit
def _turn(
    source, result, cos, sin, source_row, source_head, result_row, result_head, cos_row, sin_row, heads, size, half,
    some_heads: tl.constexpr, half_block: tl.constexpr, rest_block: tl.constexpr, paired: tl.constexpr, back: tl.constexpr,
):  # fmt: skip
    """Heads of one token: halves of what is turned lie in a thread each, so source and result may be the same memory."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * some_heads + tl.arange(0, some_heads)
    place = tl.arange(0, half_block)
    is_turned = place < half
    c = tl.load(cos + row * cos_row + place, mask=is_turned, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * sin_row + place, mask=is_turned, other=0.0).to(tl.float32)[None, :]
    if back:
        s = -s
    is_there = (head < heads)[:, None] & is_turned[None, :]
    one = 2 * place if paired else place
    other = one + (1 if paired else half)
    begin = source + row * source_row + head[:, None] * source_head
    end = result + row * result_row + head[:, None] * result_head
    first = tl.load(begin + one[None, :], mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(begin + other[None, :], mask=is_there, other=0.0).to(tl.float32)
    kind = result.dtype.element_ty
    tl.store(end + one[None, :], (first * c - second * s).to(kind), mask=is_there)
    tl.store(end + other[None, :], (second * c + first * s).to(kind), mask=is_there)
    if rest_block:
        rest = 2 * half + tl.arange(0, rest_block)
        is_rest = (head < heads)[:, None] & (rest < size)[None, :]
        tl.store(end + rest[None, :], tl.load(begin + rest[None, :], mask=is_rest, other=0.0), mask=is_rest)


def turn_in_place(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, paired: bool) -> None:
    """As `elementwise.turn_in_place`; a head's numbers lie side by side."""
    _turned(heads, heads, cos, sin, paired=paired, back=False)


def turned_back(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, paired: bool
) -> torch.Tensor:
    """As `elementwise.turned_back`."""
    counts = [part.shape[1] for part in (queries, keys, values)]
    found = queries.new_empty(len(queries), sum(counts), queries.shape[2])
    of_queries, of_keys, of_values = found.split(counts, 1)
    _turned(queries, of_queries, cos, sin, paired=paired, back=True)
    _turned(keys, of_keys, cos, sin, paired=paired, back=True)
    of_values.copy_(values)
    return found.flatten(1)


def _turned(
    source: torch.Tensor, result: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, paired: bool, back: bool
) -> None:
    assert source.stride(2) == result.stride(2) == cos.stride(1) == sin.stride(1) == 1
    (count, heads, size), half = source.shape, cos.shape[1]
    rest = size - 2 * half if source is not result else 0  # which stands there already
    half_block = triton.next_power_of_2(half)
    some = min(triton.next_power_of_2(heads), max(1, _BLOCK // half_block))
    _turn[(count, triton.cdiv(heads, some))](
        source, result, cos, sin, *source.stride()[:2], *result.stride()[:2], cos.stride(0), sin.stride(0), heads, size, half,
        some_heads=some, half_block=half_block, rest_block=triton.next_power_of_2(rest) if rest else 0, paired=paired, back=back,
    )  # fmt: skip
