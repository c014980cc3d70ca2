"""What a decoder layer computes between its matrix products, in Triton, a kernel each: norms with the residual sum before
them, rotary turns with the writing of keys and values behind them, and the gate.

Sums in fp32, rounded where transformers' own layers round the residual stream and the norm, and once otherwise.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _embed(ids, drawn, table, out, size: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + row)
    if token < 0:
        token = tl.load(drawn - 1 - token)
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_there = column < size
    found = tl.load(table + token.to(tl.int64) * size + column, mask=is_there)
    tl.store(out + row * size + column, found, mask=is_there)


def embed(ids: torch.Tensor, drawn: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of `table` [V, H], contiguous: those of int32 `ids` [T], or of the tokens in int32 `drawn` that marks among them stand
    for (`core/infer/ahead.py`). Returns [T, H]."""
    size = table.shape[1]
    out = table.new_empty(len(ids), size)
    block = 1024
    _embed[(len(ids), triton.cdiv(size, block))](ids, drawn, table, out, size=size, block=block)
    return out


@triton.jit
def _norm(
    stream, plus, after, scale, out, epsilon,
    size: tl.constexpr, columns: tl.constexpr, has_plus: tl.constexpr, has_after: tl.constexpr,
):  # fmt: skip
    """One row: stream += plus (normed itself where a family does that), then the norm of the stream."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, columns)
    is_there = column < size
    x = tl.load(stream + row * size + column, mask=is_there, other=0.0)
    if has_plus:
        more = tl.load(plus + row * size + column, mask=is_there, other=0.0)
        if has_after:
            wide = more.to(tl.float32)
            unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + epsilon)).to(more.dtype)
            more = (unit * tl.load(after + column, mask=is_there, other=0.0)).to(more.dtype)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(stream + row * size + column, x, mask=is_there)
    wide = x.to(tl.float32)
    unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + epsilon)).to(x.dtype)
    tl.store(out + row * size + column, unit * tl.load(scale + column, mask=is_there, other=0.0), mask=is_there)


def norm(
    stream: torch.Tensor, plus: torch.Tensor | None, scale: torch.Tensor, epsilon: float, after: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm (arXiv 1910.07467) of stream + plus, both [T, H]; the sum is written to `stream`. `after` is the scale of a norm
    that `plus` gets first. Returns [T, H]."""
    count, size = stream.shape
    out = torch.empty_like(stream)
    columns = triton.next_power_of_2(size)
    _norm[(count,)](
        stream, plus if plus is not None else stream, after if after is not None else scale, scale, out, epsilon,
        size=size, columns=columns, has_plus=plus is not None, has_after=after is not None, num_warps=8 if columns > 1024 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _headed(x, query_scale, key_scale, at, is_there, is_query, inverse, has_norm: tl.constexpr):
    if has_norm:
        scale = tl.load(query_scale + at, mask=is_there & is_query, other=0.0)
        scale += tl.load(key_scale + at, mask=is_there & (is_query == 0), other=0.0)
        x = ((x.to(tl.float32) * inverse).to(x.dtype) * scale).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _turn(
    mixed, query, keys, values, cosines, sines, positions, written, query_scale, key_scale, epsilon,
    heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, columns: tl.constexpr, turned: tl.constexpr,
    is_paired: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    """One token, one head: a query is turned, a key is turned and put into its page, a value is put into its page."""
    token, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = turned // 2
    column = tl.arange(0, columns)
    is_there = column < width
    start = mixed + (token.to(tl.int64) * (heads + 2 * kv_heads) + head) * width
    x = tl.load(start + column, mask=is_there, other=0.0)
    slot = tl.load(written + token).to(tl.int64)
    if head >= heads + kv_heads:
        at = (slot * kv_heads + head - heads - kv_heads) * width + column
        tl.store(values + at, x, mask=is_there & (slot >= 0))
    else:
        if is_paired:
            partner, number, is_first = column ^ 1, column // 2, column % 2 == 0
        else:
            partner, number, is_first = tl.where(column < half, column + half, column - half), column % half, column < half
        is_turned = column < turned
        wide = x.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
        other = tl.load(start + partner, mask=is_turned, other=0.0)
        mine = _headed(x, query_scale, key_scale, column, is_there, head < heads, inverse, has_norm)
        other = _headed(other, query_scale, key_scale, partner, is_turned, head < heads, inverse, has_norm)
        place = tl.load(positions + token).to(tl.int64) * half + number
        cosine = tl.load(cosines + place, mask=is_turned, other=1.0).to(tl.float32)
        sine = tl.load(sines + place, mask=is_turned, other=0.0).to(tl.float32)
        result = (mine * cosine + tl.where(is_first, -other, other) * sine).to(x.dtype)
        if head < heads:
            tl.store(query + (token.to(tl.int64) * heads + head) * width + column, result, mask=is_there)
        else:
            at = (slot * kv_heads + head - heads) * width + column
            tl.store(keys + at, result, mask=is_there & (slot >= 0))


def turn(
    mixed: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    positions: torch.Tensor,
    written: torch.Tensor,
    *,
    heads: int,
    is_paired: bool,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864): mixed [T, (H + 2 H_kv) D], all queries before keys before values -> queries
    [T, H, D]; keys and values go to their places `written` int32 [T] (-1: nowhere) in `keys` and `values` [slots, H_kv, D].

    `cosines` and `sines` [positions, R / 2]: the first R of D are turned, pairs side by side (`is_paired`, GLM) or half of R
    apart. `norms` are scales and epsilon of a norm of each query and key before.
    """
    kv_heads, width = keys.shape[1:]
    query = mixed.new_empty(len(mixed), heads, width)
    query_scale, key_scale, epsilon = norms if norms is not None else (mixed, mixed, 0.0)
    _turn[(len(mixed), heads + 2 * kv_heads)](
        mixed, query, keys, values, cosines, sines, positions, written, query_scale, key_scale, epsilon,
        heads=heads, kv_heads=kv_heads, width=width, columns=triton.next_power_of_2(width), turned=2 * cosines.shape[1],
        is_paired=is_paired, has_norm=norms is not None, num_warps=1,
    )  # fmt: skip
    return query


@triton.jit
def _gate(both, out, size: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_there = column < size
    opened = tl.load(both + row * 2 * size + column, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + column, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (opened * tl.sigmoid(opened) * up).to(out.dtype.element_ty), mask=is_there)


def gate(both: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv 2002.05202): [T, 2 I], gate before up -> silu(gate) * up [T, I]."""
    count, size = len(both), both.shape[1] // 2
    out = both.new_empty(count, size)
    block = 1024
    _gate[(count, triton.cdiv(size, block))](both, out, size=size, block=block)
    return out
