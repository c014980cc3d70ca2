"""Rotary turns, in place and back. Halves of what is turned lie in a thread each, which stores only where it alone has loaded:
source and result may be the same memory, where torch.compile would write to another and copy it back. N is tokens, D a head's
size.
"""

import torch
import triton
import triton.language as tl

_NUMBERS = 1024
"""Of a program, about."""


@triton.jit
def _turn(
    source, result, cos, sin, source_row, source_head, result_row, result_head, cos_row, sin_row, heads, size, half,
    some_heads: tl.constexpr, half_block: tl.constexpr, rest_block: tl.constexpr, paired: tl.constexpr, back: tl.constexpr,
):  # fmt: skip
    """Heads of one token."""
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
    some = min(triton.next_power_of_2(heads), max(1, _NUMBERS // half_block))
    _turn[(count, triton.cdiv(heads, some))](
        source, result, cos, sin, *source.stride()[:2], *result.stride()[:2], cos.stride(0), sin.stride(0), heads, size, half,
        some_heads=some, half_block=half_block, rest_block=triton.next_power_of_2(rest) if rest else 0, paired=paired, back=back,
    )  # fmt: skip
