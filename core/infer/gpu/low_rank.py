"""Adapters on top of a linear layer, in Triton: y += up · down · x, each row with the adapter of its own request.

Rows of one adapter stand side by side and are taken in groups: one program reads an adapter's weights once for all rows of a
group. The same two kernels serve one token of many requests (groups of 16 rows, most of them empty, many programs for each)
and prompts (groups of 64). Ranks come in pages of 16, so a rank of 64 costs its own rows four times as much and the
others nothing (S-LoRA's unified paging, arXiv 2311.03285, of ranks). Layers that read one input and are multiplied as one
matrix (queries, keys and values; gate and up) are the parts of one site: a launch of each kernel for all of them. Shapes are
arguments, not constants, so that a kernel is compiled once for all sites.

Eight adapters of rank 16 on all linear layers are 0.20 GB of a 1.1B model and 0.67 GB of an 8B one in bf16: 0.08 and 0.27 ms a
decode step at 2.5 TB/s, by 176 and 256 launches. So a launch's own microseconds count there, not its bytes: how many memory
accesses wait for each other, and how many programs come and go for nothing.
"""

import torch
import triton
import triton.language as tl

from core.infer.gpu.pool import RANKS, Pool, SiteShape

DECODE_ROWS, PROMPT_ROWS = 16, 64
"""Rows of a group at most."""


@triton.jit(do_not_specialize=["total_rows", "site", "parts"])
def _shrink(
    x, memory, table, counts, reduced, groups, stride, site, sites, down_at, total_rows, inputs, parts, each,
    most_pages: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, ranks: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One group, one share of the inputs, one part: down · x, of that share."""
    group, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, first, count = tl.load(groups + group * 3), tl.load(groups + group * 3 + 1), tl.load(groups + group * 3 + 2)
    if count > 0:
        row, rank = tl.arange(0, rows), tl.arange(0, ranks)
        is_row = row < count
        # The first page is asked for beside the number of pages, not behind it: one memory access behind the other is what a
        # decode step waits for here.
        page = tl.load(table + slot * most_pages)
        for number in range(tl.load(counts + slot * sites + site)):
            base = memory + page.to(tl.int64) * stride + down_at + part * ranks * inputs
            page = tl.load(table + slot * most_pages + tl.minimum(number + 1, most_pages - 1))
            found = tl.zeros([rows, ranks], tl.float32)
            for start in range(0, each, block):
                column = split * each + start + tl.arange(0, block)
                is_there = column < inputs
                some = tl.load(
                    x + (first + row).to(tl.int64)[:, None] * inputs + column[None, :],
                    mask=is_row[:, None] & is_there[None, :], other=0.0,
                )  # fmt: skip
                matrix = tl.load(base + rank[:, None] * inputs + column[None, :], mask=is_there[None, :], other=0.0)
                found += tl.dot(some, tl.trans(matrix), input_precision=precision)
            at = ((split * total_rows + first + row) * parts + part) * (most_pages * ranks) + number * ranks
            tl.store(reduced + at[:, None] + rank[None, :], found, mask=is_row[:, None])


@triton.jit(do_not_specialize=["total_rows", "site", "parts", "splits"])
def _expand(
    y, memory, table, counts, reduced, groups, bias, gains, stride, site, sites, up_at, gains_at, gains_stride, total_rows,
    first_width, second_width, third_width, parts, splits,
    most_pages: tl.constexpr, most_splits: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, ranks: tl.constexpr,
    precision: tl.constexpr, has_gains: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    """One group and a block of a part's outputs: gain · (y - bias) + bias + up · (what `_shrink` found)."""
    group, tile = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(groups + group * 3), tl.load(groups + group * 3 + 1), tl.load(groups + group * 3 + 2)
    if count > 0:
        pages = tl.load(counts + slot * sites + site)
        page = tl.load(table + slot * most_pages)
        if pages > 0:
            first_tiles = tl.cdiv(first_width, block)
            both_tiles = first_tiles + tl.cdiv(second_width, block)
            both_width = first_width + second_width
            outputs = both_width + third_width
            part = (tile >= first_tiles).to(tl.int32) + (tile >= both_tiles).to(tl.int32)
            begin = tl.where(part == 0, 0, tl.where(part == 1, first_width, both_width))
            end = tl.where(part == 0, first_width, tl.where(part == 1, both_width, outputs))
            tile -= tl.where(part == 0, 0, tl.where(part == 1, first_tiles, both_tiles))
            column = begin + tile * block + tl.arange(0, block)
            is_there = column < end
            row, rank, split = tl.arange(0, rows), tl.arange(0, ranks), tl.arange(0, most_splits)
            is_row = row < count
            place = y + (first + row).to(tl.int64)[:, None] * outputs + column[None, :]
            is_output = is_row[:, None] & is_there[None, :]
            straight = tl.load(place, mask=is_output, other=0.0).to(tl.float32)
            added = tl.zeros([rows, block], tl.float32)
            for number in range(pages):
                base = memory + page.to(tl.int64) * stride + up_at
                page = tl.load(table + slot * most_pages + tl.minimum(number + 1, most_pages - 1))
                matrix = tl.load(base + column[:, None] * ranks + rank[None, :], mask=is_there[:, None], other=0.0)
                # All shares of the sum at once, for the same reason.
                at = (split[:, None] * total_rows + first + row[None, :]) * parts + part
                some = tl.load(
                    reduced + at[:, :, None] * (most_pages * ranks) + number * ranks + rank[None, None, :],
                    mask=((split < splits)[:, None] & is_row[None, :])[:, :, None], other=0.0,
                )  # fmt: skip
                added += tl.dot(tl.sum(some, 0), tl.trans(matrix.to(tl.float32)), input_precision=precision)
            if has_gains:
                gain = tl.load(gains + slot.to(tl.int64) * gains_stride + gains_at + column, mask=is_there, other=1.0)
                plain = straight
                if has_bias:
                    plain -= tl.load(bias + column, mask=is_there, other=0.0).to(tl.float32)[None, :]
                straight += (gain - 1.0)[None, :] * plain
            tl.store(place, (straight + added).to(y.dtype.element_ty), mask=is_output)


def shrink(x: torch.Tensor, pool: Pool, site: SiteShape, groups: torch.Tensor, *, rows: int) -> torch.Tensor:
    """What each row's `down` makes of x [T, inputs]: fp32 partial sums for `expand`.

    `groups` int32 [G, 3]: slot, first row, number of rows (`rows` at most; 0 for a group that isn't there).
    """
    count, parts = len(x), len(site.outputs)
    each, splits = _shares(site.inputs, rows)
    block = 64 if x.element_size() > 2 else 256 if rows == DECODE_ROWS else 128
    reduced = torch.empty(splits, count, parts, pool.pages.shape[1] * RANKS, dtype=torch.float32, device=x.device)
    _shrink[(len(groups), splits, parts)](
        x, pool.memory, pool.pages, pool.counts, reduced, groups,
        pool.memory.shape[1], site.number, pool.counts.shape[1], site.down_at, count, site.inputs, parts, each,
        most_pages=pool.pages.shape[1], rows=rows, block=min(each, block), ranks=RANKS, precision=_precision(x),
    )  # fmt: skip
    return reduced


def expand(
    y: torch.Tensor,
    reduced: torch.Tensor,
    pool: Pool,
    site: SiteShape,
    groups: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    rows: int,
) -> None:
    """Add what the adapters make of `reduced` to y [T, outputs of all parts], which includes `bias`."""
    widths = (*site.outputs, 0, 0)[:3]
    is_decode = rows == DECODE_ROWS
    # Most groups of a decode step are empty, and a program for each part of their outputs comes and goes: few large ones.
    block = (512 if sum(widths) > 8192 else 128) if is_decode else 64
    gains, gains_stride = (reduced, 0) if pool.gains is None else (pool.gains, pool.gains.shape[1])
    _expand[(len(groups), sum(triton.cdiv(width, block) for width in widths))](
        y, pool.memory, pool.pages, pool.counts, reduced, groups, y if bias is None else bias, gains,
        pool.memory.shape[1], site.number, pool.counts.shape[1], site.up_at, site.gains_at, gains_stride, len(y),
        *widths, len(site.outputs), len(reduced), most_pages=pool.pages.shape[1], most_splits=_splits(rows), rows=rows,
        block=block, ranks=RANKS, precision=_precision(y), has_gains=pool.gains is not None,
        has_bias=pool.gains is not None and bias is not None, num_warps=8 if block == 512 else 4, num_stages=1,
    )  # fmt: skip


def _shares(inputs: int, rows: int) -> tuple[int, int]:
    """(inputs of a share, shares): few rows leave the card idle unless many programs read their weights; prompts don't."""
    each = max(128, triton.next_power_of_2(triton.cdiv(inputs, _splits(rows))))
    return each, triton.cdiv(inputs, each)


def _splits(rows: int) -> int:
    """Shares at most. `expand` reads them all for each block of outputs, and `shrink` hides behind the layer's own product."""
    return 8 if rows == DECODE_ROWS else 2


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
