"""Steps of a base on a GPU: own layers where the family has them, transformers' own otherwise, attention and adapters by own
kernels in both; steps of one token a request out of CUDA graphs.

What a base gets is decided when it is loaded, and said in `form`: nothing falls back while requests run. Layers that stay
transformers' own (another family, 4-bit or 8-bit weights, which are kept as they are) are slower and have no graphs.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.infer.ahead import resolved
from core.infer.attention import KeyValues, paged_attention
from core.infer.gpu.attend import piece_tokens
from core.infer.gpu.graphs import DecodeGraphs
from core.infer.gpu.layers import FusedModel, why_not
from core.infer.gpu.slots import DeviceSlots, Group
from core.infer.gpu.step import Courier, DeviceStep, StepAdapters, slots_of, tables_of
from core.infer.lora import LoraSites, LoraWeights
from core.infer.sampling import Drawing, Sampling, launch

if TYPE_CHECKING:
    from core.infer.runner import Share


class DeviceCompute:
    """`form` says how this base is computed."""

    is_asynchronous = True

    def __init__(
        self,
        model: Any,
        store: KeyValues,
        drawn: torch.Tensor,
        *,
        page: int,
        reach: int,
        adapter_gib: float,
        host_gib: float,
        make_bare: Callable[[], None],
    ) -> None:
        """`drawn` is where marks point into (`ahead.py`)."""
        self._model, self._store, self._drawn, self._page = model, store, drawn, page
        self._make_bare = make_bare
        config = model.config
        heads = config.num_attention_heads
        self._piece_tokens = piece_tokens(heads, getattr(config, "num_key_value_heads", None) or heads)
        reason = why_not(model)
        self._fused = FusedModel(model, reach) if reason is None else None
        groups: Sequence[Group] = self._fused.groups if self._fused is not None else _groups(model)
        self.slots = DeviceSlots(groups, model.device, model.dtype, gib=adapter_gib, host_gib=host_gib)
        self.sites = LoraSites(model, self.slots)
        self._courier = Courier(model.device)
        self._graphs: DecodeGraphs | None = None
        if self._fused is not None and model.device.type == "cuda":
            self._graphs = DecodeGraphs(self._fused, store, drawn, self.slots, self._courier, page=page)
        how = "own layers, graphs of steps" if reason is None else f"transformers' own layers without graphs: {reason}"
        self.form = f"{config.model_type} on {model.device}: {how}"

    @torch.inference_mode()
    def warm_up(self, rows: int) -> None:
        """Compile kernels, and capture graphs for up to `rows` rows. While nothing is in any page."""
        if self._fused is None:
            return
        from core.infer.runner import Context

        for slot in (-1, 0):
            piece = Context([0] * (self._page + 1), None, [b""], [0, 0])
            logits = self._eager(
                [(piece, self._page), (Context([0], None, [b""], [0]), 1)], [slot, slot], np.zeros(1, np.int64), self._store
            )
            launch(logits, [Drawing(Sampling(max_tokens=1), 0, (), (), ())])
            if self._graphs is not None:
                self._graphs.capture_all(rows, has_adapters=slot >= 0)

    @torch.inference_mode()
    def forward(self, shares: "Sequence[Share]", wanted: np.ndarray) -> torch.Tensor:
        """Logits [len(wanted), V] behind the rows `wanted`."""
        slots = slots_of(shares, self.slots.number)
        if self._graphs is not None and self._graphs.takes(shares):
            return self._graphs.run(shares, slots)
        return self._eager(shares, slots, wanted, self._store)

    @torch.inference_mode()
    def score(self, shares: "Sequence[Share]", store: KeyValues) -> torch.Tensor:
        """Logits [T, V] behind every token of sequences whose pages are of `store`; no slot is taken for their one adapter."""
        weights = shares[0][0].weights
        slots = [-1 if weights is None else 0] * len(shares)
        return self._eager(shares, slots, np.arange(sum(count for _, count in shares)), store, alone=weights)

    def _eager(
        self,
        shares: "Sequence[Share]",
        slots: Sequence[int],
        wanted: np.ndarray,
        store: KeyValues,
        *,
        alone: LoraWeights | None = None,
    ) -> torch.Tensor:
        tables = tables_of(shares, slots, page=self._page, piece_tokens=self._piece_tokens)
        sections = self._courier.bring(tables)
        adapters = None
        if len(tables.groups):
            pool = self.slots.pool if alone is None else self.slots.alone(alone)
            traces = None if alone is None else self.sites.traces
            layout, groups = self.slots.layout, sections[7].view(-1, 3)
            adapters = StepAdapters(pool, layout.sites, layout.places, groups, tables.group_rows, traces=traces)
        step = DeviceStep(sections, store, self._drawn, page=self._page, adapters=adapters)
        rows = torch.from_numpy(wanted)
        rows = (rows.pin_memory() if self._model.device.type == "cuda" else rows).to(self._model.device, non_blocking=True)
        if self._fused is not None:
            return self._fused.logits(self._fused.hidden(step).index_select(0, rows))
        self._make_bare()
        with paged_attention(self._model), self.sites.running((), adapters):
            logits: torch.Tensor = self._model(
                input_ids=resolved(step.ids, self._drawn)[None],
                position_ids=step.positions.long()[None],
                use_cache=False,
                logits_to_keep=rows,
                paged=step,
            ).logits[0]
        return logits


def _groups(model: Any) -> list[Group]:
    """Every linear module below the head as a site of its own."""
    head = model.get_output_embeddings()
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [[(path, module)] for path, module in linear if module is not head]
