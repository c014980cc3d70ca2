"""Attention over pages, in Triton: one query a request (a decode step), and pieces of prompts.

Nothing is padded and no key is copied: a kernel finds a request's keys by its page list. Shapes and pointers of a decode step
stay the same, so that a CUDA graph can hold it; what differs lies in tensors. A request of length 0 is a row that nobody asks.
Softmax as it goes (arXiv 2205.14135), contexts in parts that are joined by their weights (flash decoding).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634
_KEYS = 64
"""Keys of a context that a program looks at at once."""
_QUERIES = 64
"""Queries of a piece of a prompt, times the heads that share a key head, in one program."""


@dataclass(frozen=True)
class Paging:
    """Where contexts lie: request i has `lengths[i]` tokens in the pages that `pages` lists from `starts[i]` on. All int32."""

    pages: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    size: int
    """Tokens of a page."""


@triton.jit(do_not_specialize=["splits"])
def _attend_split(
    query, keys, values, parts, maxima, sums, rows, pages, starts, lengths, scale, splits,
    heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, columns: tl.constexpr,
    page: tl.constexpr, block: tl.constexpr, shared: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One request, one key head, one part of its context: the queries that share the key head, `shared` of them at least 16."""
    request, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request)
    first_page = tl.load(starts + request)
    asked = tl.load(rows + request)
    share = tl.cdiv(tl.cdiv(length, splits), block) * block
    begin = part * share
    end = tl.minimum(begin + share, length)
    group: tl.constexpr = heads // kv_heads
    row, column = tl.arange(0, shared), tl.arange(0, columns)
    head = kv_head * group + row
    is_row = row < group
    is_column = column < width
    is_query = is_row[:, None] & is_column[None, :] & (length > 0)
    q = tl.load(query + (asked * heads + head)[:, None] * width + column[None, :], mask=is_query, other=0.0)
    most = tl.full([shared], -float("inf"), tl.float32)
    total = tl.zeros([shared], tl.float32)
    result = tl.zeros([shared, columns], tl.float32)
    for start in range(begin, end, block):
        token = start + tl.arange(0, block)
        is_there = token < end
        number = tl.load(pages + first_page + token // page, mask=is_there, other=0).to(tl.int64)
        place = ((number * page + token % page) * kv_heads + kv_head)[:, None] * width + column[None, :]
        is_key = is_there[:, None] & is_column[None, :]
        k = tl.load(keys + place, mask=is_key, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        scores = tl.where(is_there[None, :], scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        shrunk = tl.exp2(most - highest)
        v = tl.load(values + place, mask=is_key, other=0.0)
        result = result * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
        total = total * shrunk + tl.sum(weights, 1)
        most = highest
    at = (request * heads + head) * splits + part
    tl.store(parts + at[:, None] * columns + column[None, :], result, mask=is_row[:, None])
    tl.store(maxima + at, most, mask=is_row)
    tl.store(sums + at, total, mask=is_row)


@triton.jit
def _attend_join(
    parts, maxima, sums, result, rows, lengths,
    heads: tl.constexpr, width: tl.constexpr, columns: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    """One head of one request: its parts, each as if it were all, are weighed against each other."""
    request, head = tl.program_id(0), tl.program_id(1)
    if tl.load(lengths + request) > 0:
        at = request * heads + head
        part, column = tl.arange(0, splits), tl.arange(0, columns)
        most = tl.load(maxima + at * splits + part)
        total = tl.load(sums + at * splits + part)
        weight = tl.where(total > 0, tl.exp2(most - tl.max(most, 0)), 0.0)
        found = tl.load(parts + (at * splits + part)[:, None] * columns + column[None, :])
        mean = tl.sum(found * weight[:, None], 0) / tl.sum(weight * total, 0)
        place = (tl.load(rows + request) * heads + head) * width + column
        tl.store(result + place, mean.to(result.dtype.element_ty), mask=column < width)


@triton.jit
def _attend_piece(
    query, keys, values, result, pieces, pages, starts, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, columns: tl.constexpr,
    page: tl.constexpr, block: tl.constexpr, tokens: tl.constexpr, shared: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """`tokens` queries of one request and the heads that share one key head: row = token x `shared` + head."""
    piece, kv_head = tl.program_id(0), tl.program_id(1)
    request, first_row = tl.load(pieces + piece * 4), tl.load(pieces + piece * 4 + 1)
    count, position = tl.load(pieces + piece * 4 + 2), tl.load(pieces + piece * 4 + 3)
    first_page = tl.load(starts + request)
    group: tl.constexpr = heads // kv_heads
    row, column = tl.arange(0, tokens * shared), tl.arange(0, columns)
    asked, head = row // shared, row % shared
    is_column = column < width
    is_query = ((asked < count) & (head < group))[:, None] & is_column[None, :]
    place = ((first_row + asked) * heads + kv_head * group + head)[:, None] * width + column[None, :]
    q = tl.load(query + place, mask=is_query, other=0.0)
    most = tl.full([tokens * shared], -float("inf"), tl.float32)
    total = tl.zeros([tokens * shared], tl.float32)
    found = tl.zeros([tokens * shared, columns], tl.float32)
    for start in range(0, position + count, block):
        token = start + tl.arange(0, block)
        is_there = token < position + count
        number = tl.load(pages + first_page + token // page, mask=is_there, other=0).to(tl.int64)
        at = ((number * page + token % page) * kv_heads + kv_head)[:, None] * width + column[None, :]
        is_key = is_there[:, None] & is_column[None, :]
        k = tl.load(keys + at, mask=is_key, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        is_seen = is_there[None, :] & (token[None, :] <= (position + asked)[:, None])
        scores = tl.where(is_seen, scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 1))  # the first key is seen by all
        weights = tl.exp2(scores - highest[:, None])
        shrunk = tl.exp2(most - highest)
        v = tl.load(values + at, mask=is_key, other=0.0)
        found = found * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
        total = total * shrunk + tl.sum(weights, 1)
        most = highest
    tl.store(result + place, (found / total[:, None]).to(result.dtype.element_ty), mask=is_query)


def attend_last(
    result: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    paging: Paging,
    *,
    scale: float,
) -> None:
    """One query a request, which sees its whole context: rows `rows[i]` of `query` and `result` [T, H, D] are request i's.

    `keys` and `values` [slots, H_kv, D], slot = page x page size + offset; `rows` int32 [B]. All contiguous.
    """
    heads, width = query.shape[1:]
    count, kv_heads = len(rows), keys.shape[1]
    splits = parts_of(count, kv_heads)
    columns = max(16, triton.next_power_of_2(width))
    wide = _is_wide(query)
    parts = query.new_empty(count * heads * splits, columns, dtype=torch.float32)
    maxima, sums = query.new_empty(2, count * heads * splits, dtype=torch.float32)
    _attend_split[(count, kv_heads, splits)](
        query, keys, values, parts, maxima, sums, rows, paging.pages, paging.starts, paging.lengths, scale * _LOG2_E, splits,
        heads=heads, kv_heads=kv_heads, width=width, columns=columns,
        page=paging.size, block=32 if wide else _KEYS,
        shared=max(16, triton.next_power_of_2(heads // kv_heads)), precision=_precision(query), num_stages=1 if wide else 2,
    )  # fmt: skip
    _attend_join[(count, heads)](
        parts, maxima, sums, result, rows, paging.lengths, heads=heads, width=width, columns=columns, splits=splits, num_warps=1
    )


def attend_pieces(
    result: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pieces: torch.Tensor,
    paging: Paging,
    *,
    scale: float,
) -> None:
    """Pieces of prompts: each query sees what is before it and itself. Shapes as `attend_last` has them.

    `pieces` int32 [N, 4]: request, first row in `query`, number of tokens (`piece_tokens` at most), position of the first.
    """
    heads, width = query.shape[1:]
    kv_heads = keys.shape[1]
    wide = _is_wide(query)
    _attend_piece[(len(pieces), kv_heads)](
        query, keys, values, result, pieces, paging.pages, paging.starts, scale * _LOG2_E,
        heads=heads, kv_heads=kv_heads, width=width, columns=max(16, triton.next_power_of_2(width)),
        page=paging.size, block=32 if wide else _KEYS, tokens=piece_tokens(heads, kv_heads),
        shared=triton.next_power_of_2(heads // kv_heads), precision=_precision(query),
        num_stages=1 if wide else 2, num_warps=8 if wide else 4,
    )  # fmt: skip


def piece_tokens(heads: int, kv_heads: int) -> int:
    """Tokens of a prompt that one program of `attend_pieces` takes."""
    return int(max(1, _QUERIES // triton.next_power_of_2(heads // kv_heads)))


def parts_of(count: int, kv_heads: int) -> int:
    """Parts of a context: four, so that one long context among short ones is not one program's; more where the card would
    be idle. Depends on shapes alone, so that it is the same in every run of a graph."""
    return int(min(32, max(4, triton.next_power_of_2(512 // max(1, count * kv_heads)))))


def _is_wide(query: torch.Tensor) -> bool:
    """Whether keys take so much of a multiprocessor's own memory that fewer are taken at once."""
    return query.element_size() > 2 or query.shape[2] > 128


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
