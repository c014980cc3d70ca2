"""Steps of a base in plain torch, on any device: the definition of a step, and the way on a CPU."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.infer.ahead import resolved
from core.infer.attention import KeyValues, PagedStep, Span, paged_attention
from core.infer.linear import OneDnnLinears
from core.infer.lora import LoraSites, LoraWeights

if TYPE_CHECKING:
    from core.infer.runner import Share


class PlainCompute:
    """The model's own layers with attention over pages; requests and adapters one after another."""

    slots = None
    is_asynchronous = False

    def __init__(self, model: Any, store: KeyValues, drawn: torch.Tensor, *, page: int, make_bare: Callable[[], None]) -> None:
        """`drawn` is where marks point into (`ahead.py`)."""
        self._model, self._store, self._drawn, self._page = model, store, drawn, page
        self._make_bare = make_bare
        self.sites = LoraSites(model)
        self._linears = OneDnnLinears(model)
        self.form = f"{model.config.model_type} on {model.device}: transformers' own layers, plain torch"

    def warm_up(self, rows: int) -> None:
        """Nothing to compile."""

    def forward(self, shares: "Sequence[Share]", wanted: np.ndarray) -> torch.Tensor:
        """Logits [len(wanted), V] behind the rows `wanted`."""
        return self._forward(shares, wanted, self._store)

    def score(self, shares: "Sequence[Share]", store: KeyValues) -> torch.Tensor:
        """Logits [T, V] behind every token of sequences whose pages are of `store`."""
        return self._forward(shares, np.arange(sum(count for _, count in shares)), store)

    @torch.inference_mode()
    def _forward(self, shares: "Sequence[Share]", wanted: np.ndarray, store: KeyValues) -> torch.Tensor:
        device = self._model.device
        ids: list[int] = []
        positions: list[int] = []
        written: list[torch.Tensor] = []
        spans: list[Span] = []
        segments: list[tuple[int, int, LoraWeights]] = []
        for context, count in shares:
            begin, there = len(ids), context.computed + count
            ids += context.ids[context.computed : there]
            positions += range(context.computed, there)
            slots = self._slots_of(context.pages, there)
            written.append(slots[context.computed :])
            spans.append(Span(begin, len(ids), slots.to(device)))
            if context.weights is not None:
                if segments and segments[-1][1] == begin and segments[-1][2] is context.weights:
                    begin = segments.pop()[0]
                segments.append((begin, len(ids), context.weights))
        self._make_bare()
        with paged_attention(self._model), self._linears.multiplying(), self.sites.running(segments):
            logits: torch.Tensor = self._model(
                input_ids=resolved(torch.tensor([ids], device=device), self._drawn),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.from_numpy(wanted).to(device),
                paged=PagedStep(torch.cat(written).to(device), spans, store),
            ).logits[0]
        return logits

    def _slots_of(self, pages: Sequence[int], tokens: int) -> torch.Tensor:
        return (torch.tensor(pages, dtype=torch.int64)[:, None] * self._page + torch.arange(self._page)).flatten()[:tokens]
