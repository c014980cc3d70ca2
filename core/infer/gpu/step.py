"""The tables of a step: whose tokens stand where, on the GPU by one copy.

All numbers of a step lie in one row of int32, written into pinned memory and copied in one go; kernels are given views of it.
Steps of one token a request may be padded to a number of rows: a row that nobody asks has length 0 and is written nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.infer.attention import KeyValues
from core.infer.gpu.attend import Paging, attend_last, attend_pieces
from core.infer.gpu.low_rank import DECODE_ROWS, PROMPT_ROWS, expand, shrink
from core.infer.gpu.pool import RANKS, Pool, SiteShape
from core.infer.lora import LoraWeights
from core.models.traces import Trace

if TYPE_CHECKING:
    from core.infer.runner import Share

_ALIGNED = 4  # 16 bytes: a pointer that is not makes Triton compile its kernel again


@dataclass(frozen=True)
class Tables:
    """What is written for a step. `groups` is empty where no row has an adapter, `pieces` where no request has two tokens."""

    ids: np.ndarray
    positions: np.ndarray
    written: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    pieces: np.ndarray
    groups: np.ndarray
    pages: np.ndarray

    @property
    def group_rows(self) -> int:
        return DECODE_ROWS if not len(self.pieces) else PROMPT_ROWS

    def sections(self) -> list[np.ndarray]:
        """In this order, so that a padded step has each at the same place; only the last one's length differs."""
        parts = (self.ids, self.positions, self.written, self.rows, self.lengths, self.starts, self.pieces, self.groups)
        return [*(part.ravel() for part in parts), self.pages]


def tables_of(
    shares: "Sequence[Share]",
    slots: Sequence[int],
    *,
    page: int,
    piece_tokens: int,
    padded: int | None = None,
) -> Tables:
    """`slots` is each share's adapter slot, -1 for none; shares of one adapter should stand side by side.

    `padded` rows for a step of one token a request, whose adapters have as many groups then; of requests without an adapter
    only, none.
    """
    counts = np.fromiter((count for _, count in shares), np.int32, len(shares))
    ends = counts.cumsum(dtype=np.int32)
    begins = ends - counts
    computed = np.fromiter((context.computed for context, _ in shares), np.int32, len(shares))
    total = int(ends[-1])
    # Requests with one token come first in the list of page lists, which `lengths` goes along.
    single = np.flatnonzero(counts == 1)
    longer = np.flatnonzero(counts > 1)
    held = [
        context.pages[: -(-(context.computed + count) // page)]
        for context, count in (shares[number] for number in (*single.tolist(), *longer.tolist()))
    ]
    sizes = np.fromiter(map(len, held), np.int32, len(held))
    starts = sizes.cumsum(dtype=np.int32) - sizes
    pages = np.fromiter(chain.from_iterable(held), np.int32, int(sizes.sum()))
    ids, written = np.empty(total, np.int32), np.empty(total, np.int32)
    positions = np.arange(total, dtype=np.int32) + np.repeat(computed - begins, counts)
    rows, done = begins[single], computed[single]
    ids[rows] = [context.ids[context.computed] for context, _ in (shares[number] for number in single.tolist())]
    written[rows] = pages[starts[: len(single)] + done // page] * page + done % page
    pieces: list[tuple[int, int, int, int]] = []
    for request, number in enumerate(longer.tolist(), len(single)):
        context, count = shares[number]
        begin, first = int(begins[number]), context.computed
        here = slice(begin, begin + count)
        ids[here] = context.ids[first : first + count]
        written[here] = pages[starts[request] + positions[here] // page] * page + positions[here] % page
        pieces += [(request, begin + n, min(piece_tokens, count - n), first + n) for n in range(0, count, piece_tokens)]
    lengths = done + 1
    groups = _groups(slots, begins, counts, PROMPT_ROWS if pieces else DECODE_ROWS)
    if padded is not None:
        nothing = np.zeros(padded - total, np.int32)
        ids, positions, lengths, starts = (np.concatenate([one, nothing]) for one in (ids, positions, lengths, starts))
        written = np.concatenate([written, nothing - 1])
        rows = np.concatenate([rows, np.arange(total, padded, dtype=np.int32)])
        if len(groups):
            groups = np.concatenate([groups, np.zeros((padded - len(groups), 3), np.int32)])
    pieces_table = np.asarray(pieces, np.int32).reshape(-1, 4)
    return Tables(ids, positions, written, rows, lengths, starts, pieces_table, groups, pages)


def _groups(slots: Sequence[int], begins: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """(slot, first row, rows) of neighbours with one adapter, `most` rows at a time."""
    runs: list[list[int]] = []
    for slot, begin, count in zip(slots, begins.tolist(), counts.tolist(), strict=True):
        if slot < 0:
            continue
        if runs and runs[-1][0] == slot and runs[-1][2] == begin:
            runs[-1][2] = begin + count
        else:
            runs.append([slot, begin, begin + count])
    groups = [(slot, first, min(most, end - first)) for slot, begin, end in runs for first in range(begin, end, most)]
    return np.asarray(groups, np.int32).reshape(-1, 3)


class Courier:
    """Brings tables to a device: pinned memory for two steps in turn, each written again only when its copy has been made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._desks: list[tuple[torch.Tensor, Any]] = [(torch.empty(0, dtype=torch.int32), None)] * 2
        self._turn = 0

    def bring(self, tables: Tables, into: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The sections of the tables on the device; `into` is memory there that is used again."""
        sections = tables.sections()
        places, length = [], 0
        for section in sections:
            places.append((length, length + len(section)))
            length += -(-len(section) // _ALIGNED) * _ALIGNED
        self._turn ^= 1
        desk, copied = self._desks[self._turn]
        if copied is not None:
            copied.synchronize()
        if len(desk) < length:
            desk = torch.empty(max(4096, 2 * length), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        paper = desk.numpy()
        for (begin, end), section in zip(places, sections, strict=True):
            paper[begin:end] = section
        if into is None:
            into = torch.empty(length, dtype=torch.int32, device=self._device)
        into[:length].copy_(desk[:length], non_blocking=True)
        if self._device.type == "cuda":
            copied = torch.cuda.current_stream(self._device).record_event()
        self._desks[self._turn] = (desk, copied)
        return [into[begin:end] for begin, end in places]


class StepAdapters:
    """Adds the adapters of a step to what linear layers compute."""

    def __init__(
        self, pool: Pool, sites: Sequence[SiteShape], places: dict[str, tuple[int, int]], groups: torch.Tensor, rows: int,
        side: Any = None, traces: dict[str, Trace] | None = None,
    ) -> None:  # fmt: skip
        """`groups` and `rows` as `low_rank.shrink` has them. `side` is a stream beside the layers' own products. `traces` are
        filled where they are given, of a step with one adapter, in slot 0, for all rows."""
        self._pool, self._sites, self._places = pool, sites, places
        self._groups, self._rows = groups, rows
        self._side = side
        self._traces = traces

    def add(self, path: str, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        """To y [T, outputs], in place, where a module is a site of its own."""
        number, _ = self._places[path]
        site, x = self._sites[number], x.contiguous()
        self._trace(number, x, y, bias)
        expand(
            y, shrink(x, self._pool, site, self._groups, rows=self._rows), self._pool, site, self._groups, bias, rows=self._rows
        )

    def multiply(self, number: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, inputs] through the layers of a site and the adapters on them: [T, outputs of all parts]."""
        site = self._sites[number]
        if self._side is None:
            reduced = shrink(x, self._pool, site, self._groups, rows=self._rows)
            y = torch.nn.functional.linear(x, weight, bias)
        else:
            own = torch.cuda.current_stream()
            self._side.wait_stream(own)
            with torch.cuda.stream(self._side):
                reduced = shrink(x, self._pool, site, self._groups, rows=self._rows)
            y = torch.nn.functional.linear(x, weight, bias)
            own.wait_stream(self._side)
        self._trace(number, x, y, bias)
        expand(y, reduced, self._pool, site, self._groups, bias, rows=self._rows)
        return y

    def _trace(self, number: int, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        """By plain math from what lies in the slot, fp32."""
        if self._traces is None:
            return
        site, pool = self._sites[number], self._pool
        pages = int(pool.counts[0, number])
        if not pages:
            return
        for path, (at, part) in self._places.items():
            if at != number:
                continue
            begin = sum(site.outputs[:part])
            end = begin + site.outputs[part]
            base = y[:, begin:end]
            added = torch.zeros_like(base, dtype=torch.float32)
            for content in pool.memory[pool.pages[0, :pages].long()].float():
                downs = content[site.down_at : site.down_at + len(site.outputs) * RANKS * site.inputs]
                down = downs.view(-1, RANKS, site.inputs)[part]
                up = content[site.up_at : site.up_at + sum(site.outputs) * RANKS].view(-1, RANKS)[begin:end]
                added += x.float() @ down.T @ up.T
            if pool.gains is not None:
                plain = base.float() if bias is None else base.float() - bias[begin:end].float()
                added += (pool.gains[0, site.gains_at + begin : site.gains_at + end] - 1) * plain
            self._traces.setdefault(path, Trace()).take(added[None], base[None])


class DeviceStep:
    """A step on the GPU: what layers ask of it."""

    def __init__(
        self,
        sections: Sequence[torch.Tensor],
        store: KeyValues,
        drawn: torch.Tensor,
        *,
        page: int,
        adapters: StepAdapters | None,
    ) -> None:
        """`ids` may hold marks into `drawn` (`ahead.py`)."""
        self.ids, self.positions, self.written, self._rows, lengths, starts, pieces, _, pages = sections
        self._pieces = pieces.view(-1, 4)
        self._paging = Paging(pages, starts, lengths, page)
        self.store, self.drawn = store, drawn
        self.adapters = adapters

    def attend(self, result: torch.Tensor, query: torch.Tensor, layer: int, scale: float) -> None:
        """query [T, H, D] over what the store holds of the layer -> result of the same shape."""
        keys, values = self.store.of(layer)
        if len(self._rows):
            attend_last(result, query, keys, values, self._rows, self._paging, scale=scale)
        if len(self._pieces):
            attend_pieces(result, query, keys, values, self._pieces, self._paging, scale=scale)

    def write_and_attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """For transformers' own layers: query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]."""
        self.store.write(layer, self.written.long(), key, value)
        query = query.contiguous()
        result = torch.empty_like(query)
        self.attend(result, query, layer, scale)
        return result


def slots_of(shares: "Sequence[Share]", number: Any) -> list[int]:
    """`number` of each share's adapter, -1 for none."""
    known: dict[LoraWeights, int] = {}
    found = []
    for context, _ in shares:
        weights = context.weights
        if weights is not None and weights not in known:
            known[weights] = number(weights)
        found.append(-1 if weights is None else known[weights])
    return found
