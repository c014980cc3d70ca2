"""Kernels of a decode step on NVIDIA GPUs, in Triton: attention over pages, and each row's own adapter.

Shapes and pointers of a step stay the same, so that a CUDA graph can hold it; what differs lies in tensors. A row without an
adapter has slot -1, a row that nobody asks has length 0.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _attend_split(
    query, keys, values, parts, maxima, sums, pages, lengths, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, most_pages: tl.constexpr, splits: tl.constexpr,
    page: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """One request, one key head, one part of its context: the queries that share the key head, `rows` of them at least 16."""
    request, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request)
    share = tl.cdiv(tl.cdiv(length, splits), block) * block
    begin = part * share
    end = tl.minimum(begin + share, length)
    group: tl.constexpr = heads // kv_heads
    row, column = tl.arange(0, rows), tl.arange(0, width)
    head = kv_head * group + row
    is_row = row < group
    q = tl.load(query + (request * heads + head)[:, None] * width + column[None, :], mask=is_row[:, None], other=0.0)
    most = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    result = tl.zeros([rows, width], tl.float32)
    for start in range(begin, end, block):
        token = start + tl.arange(0, block)
        is_there = token < end
        page_number = tl.load(pages + request * most_pages + token // page, mask=is_there, other=0)
        place = ((page_number * page + token % page) * kv_heads + kv_head).to(tl.int64)[:, None] * width + column[None, :]
        k = tl.load(keys + place, mask=is_there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(is_there[None, :], scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        shrunk = tl.exp(most - highest)
        v = tl.load(values + place, mask=is_there[:, None], other=0.0)
        result = result * shrunk[:, None] + tl.dot(weights.to(v.dtype), v)
        total = total * shrunk + tl.sum(weights, 1)
        most = highest
    at = (request * heads + head) * splits + part
    tl.store(parts + at[:, None] * width + column[None, :], result, mask=is_row[:, None])
    tl.store(maxima + at, most, mask=is_row)
    tl.store(sums + at, total, mask=is_row)


@triton.jit
def _attend_join(parts, maxima, sums, result, width: tl.constexpr, splits: tl.constexpr):
    """One head of one request: its parts, each as if it were all, are weighed against each other."""
    at = tl.program_id(0)
    part, column = tl.arange(0, splits), tl.arange(0, width)
    most = tl.load(maxima + at * splits + part)
    total = tl.load(sums + at * splits + part)
    highest = tl.max(most, 0)
    weight = tl.where(total > 0, tl.exp(most - highest), 0.0)
    found = tl.load(parts + (at * splits + part)[:, None] * width + column[None, :])
    over = tl.sum(weight * total, 0)
    mean = tl.sum(found * weight[:, None], 0) / tl.where(over > 0, over, 1.0)
    tl.store(result + at * width + column, mean.to(result.dtype.element_ty))


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    *,
    page: int,
    scale: float,
    splits: int,
) -> torch.Tensor:
    """One query a request, over its own pages: query [B, H, D] -> [B, H, D].

    `keys` and `values` [slots, H_kv, D]; `pages` int32 [B, P] and `lengths` int32 [B] say where a request's context lies and
    how long it is. `splits` is a power of two: parts of a context that are worked on at once. D is a power of two of 16 at least.
    """
    count, heads, width = query.shape
    kv_heads = keys.shape[1]
    parts = query.new_empty(count * heads * splits, width, dtype=torch.float32)
    maxima, sums = (query.new_empty(count * heads * splits, dtype=torch.float32) for _ in range(2))
    rows = max(16, triton.next_power_of_2(heads // kv_heads))
    _attend_split[(count, kv_heads, splits)](
        query, keys, values, parts, maxima, sums, pages, lengths, scale,
        heads=heads, kv_heads=kv_heads, width=width, most_pages=pages.shape[1], splits=splits, page=page, block=64, rows=rows,
    )  # fmt: skip
    result = torch.empty_like(query)
    _attend_join[(count * heads,)](parts, maxima, sums, result, width=width, splits=splits)
    return result


@triton.jit
def _shrink(x, down, reduced, slots, inputs: tl.constexpr, rank: tl.constexpr, parts: tl.constexpr, block: tl.constexpr):
    """One row and one part of its inputs: what its adapter's A makes of them."""
    row, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        each: tl.constexpr = (inputs + parts - 1) // parts
        number = tl.arange(0, rank)
        found = tl.zeros([rank], tl.float32)
        for start in range(0, each, block):
            column = start + tl.arange(0, block)
            is_there = (column < each) & (part * each + column < inputs)
            column = part * each + column
            some = tl.load(x + row * inputs + column, mask=is_there, other=0.0).to(tl.float32)
            place = (slot.to(tl.int64) * rank + number)[:, None] * inputs + column[None, :]
            matrix = tl.load(down + place, mask=is_there[None, :], other=0.0).to(tl.float32)
            found += tl.sum(matrix * some[None, :], 1)
        tl.store(reduced + (row * parts + part) * rank + number, found)


@triton.jit
def _expand(y, up, reduced, slots, outputs: tl.constexpr, rank: tl.constexpr, parts: tl.constexpr, block: tl.constexpr):
    """One row and a block of its outputs: B of its adapter on top."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        column = tl.program_id(1) * block + tl.arange(0, block)
        number, part = tl.arange(0, rank), tl.arange(0, parts)
        small = tl.sum(tl.load(reduced + (row * parts + part)[:, None] * rank + number[None, :]), 0)
        is_there = column < outputs
        place = (slot.to(tl.int64) * outputs + column)[:, None] * rank + number[None, :]
        matrix = tl.load(up + place, mask=is_there[:, None], other=0.0).to(tl.float32)
        at = y + row * outputs + column
        sum = tl.load(at, mask=is_there, other=0.0).to(tl.float32) + tl.sum(matrix * small[None, :], 1)
        tl.store(at, sum.to(y.dtype.element_ty), mask=is_there)


def add_adapters(y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, slots: torch.Tensor) -> None:
    """y [B, outputs] += up · down · x [B, inputs], each row with the adapter in its slot.

    `down` [S, r, inputs] and `up` [S, outputs, r], alpha over rank multiplied in; `slots` int32 [B], -1 for none. r is a power
    of two.
    """
    (count, inputs), (_, rank, _), outputs = x.shape, down.shape, y.shape[1]
    parts = triton.next_power_of_2(max(1, min(16, inputs // 512)))
    reduced = torch.empty(count, parts, rank, dtype=torch.float32, device=x.device)
    _shrink[(count, parts)](x, down, reduced, slots, inputs=inputs, rank=rank, parts=parts, block=min(256, triton.next_power_of_2(inputs)))
    block = 128
    _expand[(count, triton.cdiv(outputs, block))](y, up, reduced, slots, outputs=outputs, rank=rank, parts=parts, block=block)
