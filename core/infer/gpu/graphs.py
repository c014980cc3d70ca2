"""CUDA graphs of steps in which every request has one token: the whole step, layers and head, is one launch.

A graph holds addresses, so all that differs from step to step lies in one row of tables and in slots and pages, whose memory
stays. There is one for each number of rows in `bucket_of` and for each of: no adapter in the step (no adapter's kernel is in
it then), adapters, adapters of which some have gains (DoRA). They share one pool of memory, since no two run at once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from core.infer.attention import KeyValues
from core.infer.gpu.layers import FusedModel
from core.infer.gpu.slots import DeviceSlots
from core.infer.gpu.step import Courier, DeviceStep, StepAdapters, Tables, tables_of

if TYPE_CHECKING:
    from core.infer.runner import Share

MOST_ROWS = 256
"""More requests than that run without a graph: their launches hide behind their work."""
_Key = tuple[int, bool, bool]
"""(rows, has adapters, some have gains)."""


class DecodeGraphs:
    def __init__(
        self, fused: FusedModel, store: KeyValues, drawn: torch.Tensor, slots: DeviceSlots, courier: Courier, *, page: int
    ) -> None:
        self._fused, self._store, self._drawn, self._slots, self._courier = fused, store, drawn, slots, courier
        self._page = page
        self._graphs: dict[_Key, Any] = {}
        self._tables = torch.empty(0, dtype=torch.int32)
        self._logits = torch.empty(0)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream, self._side = torch.cuda.Stream(), torch.cuda.Stream()

    def takes(self, shares: "Sequence[Share]") -> bool:
        return len(shares) <= MOST_ROWS and all(count == 1 for _, count in shares)

    def run(self, shares: "Sequence[Share]", slots: Sequence[int]) -> torch.Tensor:
        """Logits [len(shares), V]: what was there before is written over."""
        padded = bucket_of(len(shares))
        tables = tables_of(shares, slots, page=self._page, piece_tokens=1, padded=padded)
        key = (padded, bool(len(tables.groups)), bool(len(tables.groups)) and self._slots.pool.gains is not None)
        self._make_place()
        sections = self._courier.bring(tables, self._tables)
        if key not in self._graphs:
            self._graphs[key] = self._captured(sections, tables)
        self._graphs[key].replay()
        return self._logits[: len(shares)]

    def capture_all(self, rows: int, *, has_adapters: bool) -> None:
        """For up to `rows` rows, the largest first: the smaller ones find their memory in its."""
        from core.infer.runner import Context

        for padded in sorted({bucket_of(count) for count in range(1, min(rows, MOST_ROWS) + 1)}, reverse=True):
            shares = [(Context([0], None, [b""], [0]), 1)] * padded
            self.run(shares, [0 if has_adapters else -1] * padded)

    def _make_place(self) -> None:
        """At the first step, when the model's device is known to be in use."""
        if not len(self._tables):
            weight = self._fused.head_weight
            # Requests that share pages each list them.
            most = 16 * MOST_ROWS + MOST_ROWS * (self._store.slots // self._page)
            self._tables = torch.zeros(most, dtype=torch.int32, device=weight.device)
            self._logits = torch.empty(MOST_ROWS, len(weight), dtype=weight.dtype, device=weight.device)

    def _captured(self, sections: Sequence[torch.Tensor], tables: Tables) -> Any:
        adapters = None
        if len(tables.groups):
            layout, groups = self._slots.layout, sections[7].view(-1, 3)
            adapters = StepAdapters(self._slots.pool, layout.sites, layout.places, groups, tables.group_rows, side=self._side)
        step = DeviceStep(sections, self._store, self._drawn, page=self._page, adapters=adapters)
        out = self._logits[: len(tables.ids)]
        own = torch.cuda.current_stream()
        self._stream.wait_stream(own)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Once outside: compiling and loading a kernel can't be captured. What it writes the replay writes again.
            self._fused.logits(self._fused.hidden(step), out=out)
            # Other threads may read an adapter meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._fused.logits(self._fused.hidden(step), out=out)
            finally:
                graph.capture_end()
        own.wait_stream(self._stream)
        return graph


def bucket_of(count: int) -> int:
    """Rows of the graph that takes so many requests."""
    for upto, each in ((4, 2), (8, 4), (64, 8), (128, 16)):
        if count <= upto:
            return 1 if count == 1 else -(-count // each) * each
    return -(-count // 32) * 32
