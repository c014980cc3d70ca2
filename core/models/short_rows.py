"""Attention within short packed rows on NVIDIA GPUs, in Triton.

torch's flash attention cuts rows into blocks of 128 and adds up a query's gradient from many of them, in fp32 and in any order;
that pays where rows are long. Of rows of some 130 tokens most of a block is empty, and a gradient's blocks are two. Here blocks
are 64, every sum is one program's own, and results are the same in every run. Softmax as it goes (arXiv 2205.14135), backward by
recomputation as flash attention's (arXiv 2307.08691). N is tokens, S rows, D a head's size.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_PROGRAMS = 264
"""Two for each multiprocessor of an H100: with fewer the heads that share a key go to programs of their own."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward(
    query, key, value, result, log_sums, bounds, q_row, q_head, k_row, k_head, v_row, v_head, count, scale,
    heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of a row's queries of one head."""
    head, row = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(bounds + row), tl.load(bounds + row + 1)
    first = begin + tl.program_id(2) * block
    if first < end:
        token, column = first + tl.arange(0, block), tl.arange(0, columns)
        is_column = (column < size)[None, :]
        is_query = (token < end)[:, None] & is_column
        q = tl.load(query + token.to(tl.int64)[:, None] * q_row + head * q_head + column[None, :], mask=is_query, other=0.0)
        most = tl.full([block], -float("inf"), tl.float32)
        total = tl.zeros([block], tl.float32)
        found = tl.zeros([block, columns], tl.float32)
        for start in range(begin, first + block, block):
            other = start + tl.arange(0, block)
            is_key = (other < end)[:, None] & is_column
            at = other.to(tl.int64)[:, None]
            k = tl.load(key + at * k_row + (head // group) * k_head + column[None, :], mask=is_key, other=0.0)
            v = tl.load(value + at * v_row + (head // group) * v_head + column[None, :], mask=is_key, other=0.0)
            scores = tl.where(other[None, :] <= token[:, None], tl.dot(q, tl.trans(k)) * (scale * LOG2_E), -float("inf"))
            highest = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - highest[:, None])
            shrunk = tl.exp2(most - highest)
            found = found * shrunk[:, None] + tl.dot(weights.to(v.dtype), v)
            total = total * shrunk + tl.sum(weights, 1)
            most = highest
        place = token.to(tl.int64)[:, None] * (heads * size) + head * size + column[None, :]
        tl.store(result + place, (found / total[:, None]).to(result.dtype.element_ty), mask=is_query)
        tl.store(log_sums + head * count + token, most + tl.log2(total), mask=token < end)


@triton.jit
def _backward_queries(
    query, key, value, result, gradient, of_query, log_sums, products, bounds,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, count, scale,
    heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The same block's gradient, and of each query the product of result and gradient, which keys need."""
    head, row = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(bounds + row), tl.load(bounds + row + 1)
    first = begin + tl.program_id(2) * block
    if first < end:
        token, column = first + tl.arange(0, block), tl.arange(0, columns)
        is_column = (column < size)[None, :]
        is_query = (token < end)[:, None] & is_column
        mine = token.to(tl.int64)[:, None]
        place = mine * (heads * size) + head * size + column[None, :]
        q = tl.load(query + mine * q_row + head * q_head + column[None, :], mask=is_query, other=0.0)
        of_result = tl.load(gradient + mine * g_row + head * g_head + column[None, :], mask=is_query, other=0.0)
        o = tl.load(result + place, mask=is_query, other=0.0)
        product = tl.sum(o.to(tl.float32) * of_result.to(tl.float32), 1)
        tl.store(products + head * count + token, product, mask=token < end)
        log_sum = tl.load(log_sums + head * count + token, mask=token < end, other=0.0)
        found = tl.zeros([block, columns], tl.float32)
        for start in range(begin, first + block, block):
            other = start + tl.arange(0, block)
            is_key = (other < end)[:, None] & is_column
            at = other.to(tl.int64)[:, None]
            k = tl.load(key + at * k_row + (head // group) * k_head + column[None, :], mask=is_key, other=0.0)
            v = tl.load(value + at * v_row + (head // group) * v_head + column[None, :], mask=is_key, other=0.0)
            scores = tl.where(other[None, :] <= token[:, None], tl.dot(q, tl.trans(k)) * (scale * LOG2_E), -float("inf"))
            weights = tl.exp2(scores - log_sum[:, None])
            of_scores = weights * (tl.dot(of_result, tl.trans(v)) - product[:, None])
            found += tl.dot(of_scores.to(k.dtype), k)
        tl.store(of_query + place, (found * scale).to(of_query.dtype.element_ty), mask=is_query)


@triton.jit
def _backward_keys(
    query, key, value, gradient, of_key, of_value, log_sums, products, bounds,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, count, scale,
    heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, columns: tl.constexpr, block: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """A block of a row's keys and values, of all the heads that share them or, in `parts`, of some each."""
    kv_head, part, row = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    begin, end = tl.load(bounds + row), tl.load(bounds + row + 1)
    first = begin + tl.program_id(2) * block
    if first < end:
        token, column = first + tl.arange(0, block), tl.arange(0, columns)
        is_column = (column < size)[None, :]
        is_key = (token < end)[:, None] & is_column
        mine = token.to(tl.int64)[:, None]
        k = tl.load(key + mine * k_row + kv_head * k_head + column[None, :], mask=is_key, other=0.0)
        v = tl.load(value + mine * v_row + kv_head * v_head + column[None, :], mask=is_key, other=0.0)
        found_key = tl.zeros([block, columns], tl.float32)
        found_value = tl.zeros([block, columns], tl.float32)
        for number in range(group // parts):
            head = kv_head * group + part * (group // parts) + number
            for start in range(first, end, block):
                other = start + tl.arange(0, block)
                is_query = (other < end)[:, None] & is_column
                at = other.to(tl.int64)[:, None]
                q = tl.load(query + at * q_row + head * q_head + column[None, :], mask=is_query, other=0.0)
                of_result = tl.load(gradient + at * g_row + head * g_head + column[None, :], mask=is_query, other=0.0)
                log_sum = tl.load(log_sums + head * count + other, mask=other < end, other=0.0)
                product = tl.load(products + head * count + other, mask=other < end, other=0.0)
                is_seen = (token[None, :] <= other[:, None]) & (token < end)[None, :] & (other < end)[:, None]
                scores = tl.where(is_seen, tl.dot(q, tl.trans(k)) * (scale * LOG2_E), -float("inf"))
                weights = tl.exp2(scores - log_sum[:, None])
                found_value += tl.dot(tl.trans(weights.to(of_result.dtype)), of_result)
                of_scores = weights * (tl.dot(of_result, tl.trans(v)) - product[:, None])
                found_key += tl.dot(tl.trans(of_scores.to(q.dtype)), q)
        place = (part * count + mine) * (heads // group * size) + kv_head * size + column[None, :]
        tl.store(of_key + place, (found_key * scale).to(of_key.dtype.element_ty), mask=is_key)
        tl.store(of_value + place, found_value.to(of_value.dtype.element_ty), mask=is_key)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        count, heads, size = q.shape
        result = q.new_empty(count, heads, size)
        log_sums = q.new_empty(heads, count, dtype=torch.float32)
        options = _options(q, k)
        blocks = triton.cdiv(longest, options["block"])
        _forward[(heads, len(bounds) - 1, blocks)](q, k, v, result, log_sums, bounds, *_strides(q, k, v), count, scale, **options)
        ctx.save_for_backward(q, k, v, result, log_sums, bounds)
        ctx.blocks, ctx.scale = blocks, scale
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, result, log_sums, bounds = ctx.saved_tensors
        count, heads, _ = q.shape
        if gradient.stride(2) != 1:
            gradient = gradient.contiguous()
        options, rows = _options(q, k), len(bounds) - 1
        group, kv_heads = options["group"], k.shape[1]
        parts = group if triton.cdiv(count, options["block"]) * kv_heads < _PROGRAMS else 1
        of_q, products = q.new_empty(q.shape), torch.empty_like(log_sums)
        of_k, of_v = (k.new_empty(parts, *k.shape, dtype=k.dtype if parts == 1 else torch.float32) for _ in range(2))
        strides = _strides(q, k, v, gradient)
        _backward_queries[(heads, rows, ctx.blocks)](
            q, k, v, result, gradient, of_q, log_sums, products, bounds, *strides, count, ctx.scale, **options
        )
        _backward_keys[(kv_heads * parts, rows, ctx.blocks)](
            q, k, v, gradient, of_k, of_v, log_sums, products, bounds, *strides, count, ctx.scale, parts=parts, **options
        )
        of_k, of_v = (part[0] if parts == 1 else part.sum(0).to(k.dtype) for part in (of_k, of_v))
        return of_q, of_k, of_v, None, None, None


def _options(q: torch.Tensor, k: torch.Tensor) -> dict[str, int]:
    """Wide heads fill a multiprocessor's own memory: blocks that wait there for their turn leave it to one program. Where keys
    have many heads to go through that costs more than waiting for each block does."""
    heads, size = q.shape[1:]
    group, columns = heads // k.shape[1], triton.next_power_of_2(size)
    is_crowded = columns > 128 or (columns > 64 and group > 1)
    options = {"heads": heads, "group": group, "size": size, "columns": columns}
    return options | {"block": 32 if columns > 128 else 64, "num_stages": 1 if is_crowded else 3}


def attend_short_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Causal attention within rows: q [N, H, D], k and v [N, H_kv, D], a head's numbers side by side -> [N, H, D].

    Row s is `bounds[s]` .. `bounds[s + 1]`, int32 [S + 1] on the device, and no longer than `longest`. With a way back.
    """
    found: torch.Tensor = _Rows.apply(q, k, v, bounds, longest, scale)
    return found


def _strides(*parts: torch.Tensor) -> list[int]:
    assert all(part.stride(2) == 1 for part in parts)
    return [stride for part in parts for stride in part.stride()[:2]]
