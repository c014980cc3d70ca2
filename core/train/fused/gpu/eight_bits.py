"""What 8-bit products need beside themselves (core.models.fp8): rows rounded to e4m3, and codes turned over."""

from typing import Any

import torch
import triton
import triton.language as tl

_LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(1e-30)
_TILE = 64


@triton.jit
def _rounded(x, factors, codes, scales, row_stride, size, block: tl.constexpr, has_factors: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    is_there = column < size
    wide = tl.load(x + row * row_stride + column, mask=is_there, other=0.0).to(tl.float32)
    if has_factors:
        wide *= tl.load(factors + column, mask=is_there, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(wide), 0), _LEAST) * (1.0 / _LARGEST)
    tl.store(scales + row, scale)
    tl.store(codes + row * size + column, tl.div_rn(wide, scale).to(tl.float8e4nv), mask=is_there)


@triton.jit
def _turned_over(codes, result, rows, columns, tile: tl.constexpr):
    row, column = tl.program_id(0) * tile + tl.arange(0, tile), tl.program_id(1) * tile + tl.arange(0, tile)
    is_there = (row < rows)[:, None] & (column < columns)[None, :]
    part = tl.load(codes + row.to(tl.int64)[:, None] * columns + column[None, :], mask=is_there, other=0)
    tl.store(result + column.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(part), mask=tl.trans(is_there))


def rows_in_8_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `core.models.fp8.rows_in_8_bits`."""
    return _made(x, None)


def scaled_in_8_bits(x: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `core.models.fp8.scaled_in_8_bits`."""
    return _made(x, factors)


def turned_over(codes: torch.Tensor) -> torch.Tensor:
    """As `core.models.fp8.turned_over`: uint8 [O, I], contiguous."""
    assert codes.is_contiguous()
    rows, columns = codes.shape
    result = codes.new_empty(columns, rows)
    _turned_over[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](codes, result, rows, columns, tile=_TILE)
    return result


def _made(x: torch.Tensor, factors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.stride(1) == 1
    count, size = x.shape
    codes = x.new_empty(count, size, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(count, 1, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    given = {"has_factors": factors is not None, "num_warps": min(16, max(1, block // 512))}
    _rounded[(count,)](x, x if factors is None else factors, codes, scales, x.stride(0), size, block=block, **given)
    return codes, scales
