"""RMSNorm and its ways back: a row, or a head of a token, in one program. Rounded where `elementwise.py` rounds."""

from typing import Any

import torch
import triton
import triton.language as tl

_TOKENS = 64
"""Whose products one program sums up for the gradient of a scale."""
_COLUMNS = 256


@triton.jit
def _scaled(x, unit, scale, kind, is_narrow: tl.constexpr):
    """`unit` rounded as x is, times the scale; a product of two narrow numbers is narrow."""
    found = unit.to(x.dtype).to(tl.float32) * scale.to(tl.float32)
    if is_narrow:
        found = found.to(x.dtype).to(tl.float32)
    return found.to(kind)


@triton.jit
def _forward(
    x, scale, inverse, result, x_row, x_head, heads, size, epsilon,
    block: tl.constexpr, again: tl.constexpr, is_narrow: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, block)
    is_there = column < size
    part = tl.load(x + row * x_row + head * x_head + column, mask=is_there, other=0.0)
    wide, at = part.to(tl.float32), row * heads + head
    if again:
        over = tl.load(inverse + at)
    else:
        over = 1 / tl.sqrt_rn(tl.sum(wide * wide, 0) / size + epsilon)
        tl.store(inverse + at, over)
    factor = tl.load(scale + head * size + column, mask=is_there, other=0.0)
    tl.store(result + at * size + column, _scaled(part, wide * over, factor, result.dtype.element_ty, is_narrow), mask=is_there)


@triton.jit
def _backward(
    gradient, x, scale, inverse, further, result, again, g_row, g_head, x_row, x_head, f_row, heads, size,
    block: tl.constexpr, has_further: tl.constexpr, has_again: tl.constexpr, is_narrow: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, at = tl.arange(0, block), row * heads + head
    is_there = column < size
    part = tl.load(x + row * x_row + head * x_head + column, mask=is_there, other=0.0)
    factor = tl.load(scale + head * size + column, mask=is_there, other=0.0)
    over = tl.load(inverse + at)
    unit = part.to(tl.float32) * over
    given = tl.load(gradient + row * g_row + head * g_head + column, mask=is_there, other=0.0).to(tl.float32)
    scaled = given * factor.to(tl.float32)
    found = over * (scaled - unit * (tl.sum(scaled * unit, 0) / size))
    if has_further:
        found += tl.load(further + row * f_row + column, mask=is_there, other=0.0).to(tl.float32)
    tl.store(result + at * size + column, found.to(result.dtype.element_ty), mask=is_there)
    if has_again:
        made = _scaled(part, unit, factor, again.dtype.element_ty, is_narrow)
        tl.store(again + at * size + column, made, mask=is_there)


@triton.jit
def _backward_scale(
    gradient, x, inverse, sums, g_row, g_head, x_row, x_head, count, heads, size, tokens: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Some tokens of some columns of a head: the sum of their products."""
    first, head = tl.program_id(0).to(tl.int64) * tokens, tl.program_id(1)
    column = tl.program_id(2) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for number in range(tokens):
        at = first + number
        is_there = (column < size) & (at < count)
        part = tl.load(x + at * x_row + head * x_head + column, mask=is_there, other=0.0).to(tl.float32)
        given = tl.load(gradient + at * g_row + head * g_head + column, mask=is_there, other=0.0).to(tl.float32)
        total += given * (part * tl.load(inverse + at * heads + head, mask=at < count, other=0.0))
    tl.store(sums + (tl.program_id(0) * heads + head) * size + column, total, mask=column < size)


def normed(x: torch.Tensor, scale: torch.Tensor, epsilon: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `elementwise.normed`: x [N, D] or [N, heads, D]."""
    inverse = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return _made(x, scale, inverse, dtype, epsilon, again=False), inverse


def normed_again(x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `elementwise.normed_again`."""
    return _made(x, scale, inverse, dtype, 0.0, again=True)


def normed_back(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor, further: torch.Tensor | None
) -> torch.Tensor:
    """As `elementwise.normed_back`."""
    return _went_back(gradient, x, scale, inverse, further, None)


def normed_back_and_again(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor, further: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `elementwise.normed_back_and_again`."""
    again = gradient.new_empty(x.shape)
    return _went_back(gradient, x, scale, inverse, further, again), again


def normed_back_scale(gradient: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """As `elementwise.normed_back_scale`."""
    count, heads, size, x_row, x_head = _laid_out(x)
    parts = triton.cdiv(count, _TOKENS)
    sums = x.new_empty(parts, *x.shape[1:], dtype=torch.float32)
    grid = (parts, heads, triton.cdiv(size, _COLUMNS))
    strides = (*_laid_out(gradient)[3:], x_row, x_head)
    _backward_scale[grid](gradient, x, inverse, sums, *strides, count, heads, size, tokens=_TOKENS, block=_COLUMNS, num_warps=2)
    return sums.sum(0)


def _made(
    x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype, epsilon: float, *, again: bool
) -> torch.Tensor:
    count, heads, size, row, head = _laid_out(x)
    result = x.new_empty(x.shape, dtype=dtype)
    options = {"is_narrow": _is_narrow(x, scale), **_wide(size)}
    _forward[(count, heads)](x, scale, inverse, result, row, head, heads, size, epsilon, again=again, **options)
    return result


def _went_back(gradient: Any, x: Any, scale: Any, inverse: Any, further: Any, again: Any) -> torch.Tensor:
    count, heads, size, row, head = _laid_out(x)
    assert further is None or (heads == 1 and further.stride(-1) == 1)
    result: torch.Tensor = x.new_empty(x.shape)
    strides = (*_laid_out(gradient)[3:], row, head, 0 if further is None else further.stride(0))
    options = {"has_further": further is not None, "has_again": again is not None, "is_narrow": _is_narrow(x, scale)}
    _backward[(count, heads)](
        gradient, x, scale, inverse, further if further is not None else x, result, again if again is not None else result,
        *strides, heads, size, **options, **_wide(size),
    )  # fmt: skip
    return result


def _laid_out(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    """(N, heads, D, numbers from token to token, from head to head)."""
    assert x.stride(-1) == 1
    if x.ndim == 2:
        return len(x), 1, x.shape[1], x.stride(0), 0
    count, heads, size = x.shape
    return count, heads, size, x.stride(0), x.stride(1)


def _is_narrow(x: torch.Tensor, scale: torch.Tensor) -> bool:
    assert scale.is_contiguous()
    return torch.promote_types(x.dtype, scale.dtype) != torch.float32


def _wide(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"block": block, "num_warps": min(16, max(1, block // 256))}
