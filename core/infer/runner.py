"""One step of one base: the next tokens of many requests, each with its own adapter or none, through the model once.

The tokens lie end to end in one row [1, T]; positions, pages and adapters say whose is whose. What comes out are the logits
behind each request's last token. No queue, no sampling, no text: `schedule.py` decides what runs, `lane.py` what follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from core.catalog import packed_reach
from core.infer.attention import KeyValues, PagedStep, Span, paged_attention
from core.infer.linear import OneDnnLinears
from core.infer.lora import LoraSites, LoraWeights
from core.infer.pages import Pages, chain_key

PAGE = 16
"""Tokens of a page."""


@dataclass
class Context:
    """The tokens of one request so far, and how far their keys and values lie in `pages`.

    `chain` holds the keys of its root and of its full pages, as far as they are published.
    """

    ids: list[int]
    weights: LoraWeights | None
    chain: list[bytes]
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    shared: int = 0
    """Tokens that another request's pages held when it began."""

    @property
    def left(self) -> int:
        """Tokens that are yet to be computed; 1 while it is being answered."""
        return len(self.ids) - self.computed


Share = tuple[Context, int]
"""A context and how many of its next tokens take part in a step."""


class Runner:
    """The fast path of a base. The engine's thread alone calls it; reading adapters (`sites.read`) is anybody's."""

    def __init__(self, model: Any, *, kv_tokens: int, make_bare: Callable[[], None] = lambda: None) -> None:
        """`kv_tokens` is the room for keys and values. `make_bare` is called before each step: other adapters on the model
        must not act in it. Raises ValueError for a model that packed steps can't express (`reach_of`)."""
        self.reach = reach_of(model)
        if not self.reach:
            raise ValueError("packed steps can't express the model's attention")
        self._model = model
        self._make_bare = make_bare
        self.sites = LoraSites(model)
        self._linears = OneDnnLinears(model)
        self.pages = Pages(kv_tokens // PAGE, PAGE)
        self._store = KeyValues(self.pages.count * PAGE)

    @property
    def kv_tokens(self) -> int:
        """Most tokens that one request may come to."""
        return self.pages.count * PAGE

    def begin(self, context: Context) -> None:
        """Take up the pages that hold the beginning of its tokens already. The last token is always computed."""
        while (context.computed + PAGE) < len(context.ids):
            key = chain_key(context.chain[-1], context.ids[context.computed : context.computed + PAGE])
            page = self.pages.find(key)
            if page is None:
                break
            context.chain.append(key)
            context.pages.append(page)
            context.computed += PAGE

    def reserve(self, context: Context, tokens: int) -> bool:
        """Pages for its next `tokens`; False, and nothing taken, where there are not enough."""
        missing = self.pages.needed(context.computed + tokens) - len(context.pages)
        taken = self.pages.take(max(missing, 0))
        if taken is None:
            return False
        context.pages += taken
        return True

    def release(self, context: Context) -> None:
        """Give its pages back: it has ended, or waits to be computed anew."""
        self.pages.give_back(context.pages)
        del context.chain[1:]
        context.pages, context.computed = [], 0

    def step(self, shares: Sequence[Share]) -> torch.Tensor:
        """Run reserved tokens; logits [len(shares), V] behind each share's last one. Nothing has moved where it raises."""
        ends = np.cumsum([count for _, count in shares])
        logits = self._forward(shares, ends - 1, self._store)
        for context, count in shares:
            context.computed += count
            self._publish(context)
        return logits

    def score(self, ids: list[int], weights: LoraWeights | None) -> torch.Tensor:
        """Logits [len(ids), V] behind every token of a sequence; it takes no room of running requests."""
        pages = list(range(self.pages.needed(len(ids))))
        alone = Context(ids, weights, [b""], pages)
        return self._forward([(alone, len(ids))], np.arange(len(ids)), KeyValues(len(pages) * PAGE))

    @torch.inference_mode()
    def _forward(self, shares: Sequence[Share], wanted: np.ndarray, store: KeyValues) -> torch.Tensor:
        """Logits [len(wanted), V] behind the rows `wanted` of the step."""
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
            slots = self._slots(context, there)
            written.append(slots[context.computed :])
            spans.append(Span(begin, len(ids), slots.to(device)))
            if context.weights is not None:
                if segments and segments[-1][1] == begin and segments[-1][2] is context.weights:
                    begin = segments.pop()[0]
                segments.append((begin, len(ids), context.weights))
        self._make_bare()
        with paged_attention(self._model), self._linears.multiplying(), self.sites.running(segments):
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.from_numpy(wanted).to(device),
                paged=PagedStep(torch.cat(written).to(device), spans, store),
            ).logits[0]
        return logits

    def _slots(self, context: Context, tokens: int) -> torch.Tensor:
        pages = torch.tensor(context.pages, dtype=torch.int64)
        return (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[:tokens]

    def _publish(self, context: Context) -> None:
        while (done := (len(context.chain) - 1) * PAGE) + PAGE <= context.computed:
            key = chain_key(context.chain[-1], context.ids[done : done + PAGE])
            self.pages.publish(context.pages[done // PAGE], key)
            context.chain.append(key)


def reach_of(model: Any) -> int:
    """Most tokens of a request that packed steps can express; 0 where they can't express the model at all."""
    architecture = (model.config.architectures or ["unknown"])[0]
    return packed_reach(architecture, model.config.to_dict(), model.config.max_position_embeddings)


def kv_bytes_per_token(model: Any) -> int:
    """Bytes that the keys and values of one token take in all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)
