"""One step of one base: the next tokens of many requests, each with its own adapter or none, through the model once.

The tokens lie end to end in one row [1, T]; positions, pages and adapters say whose is whose. What comes out are the logits
behind each request's last token. No queue, no sampling, no text: `schedule.py` decides what runs, `lane.py` what follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.catalog import packed_reach
from core.infer import ahead
from core.infer.attention import KeyValues
from core.infer.lora import LoraWeights, Residence
from core.infer.pages import Pages, chain_key
from core.infer.plain import PlainCompute

if TYPE_CHECKING:
    from core.infer.gpu.compute import DeviceCompute

PAGE = 16
"""Tokens of a page."""
ADAPTER_GIB, HOST_GIB = 2.0, 16.0
"""Room for adapters on a GPU, and in pinned memory beside it: of an 8B model in bf16 25 and 128 of rank 16."""


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
    unknown: int = 0
    """1 where the last id is a mark (`ahead.py`), else 0."""

    @property
    def left(self) -> int:
        """Tokens that are yet to be computed; 1 while it is being answered."""
        return len(self.ids) - self.computed

    @property
    def known(self) -> int:
        """Ids that are tokens."""
        return len(self.ids) - self.unknown

    def take(self, token: int) -> None:
        """Its next token."""
        self.ids.append(token)

    def take_mark(self, row: int) -> None:
        """Its next token was drawn in this row, and is not known yet."""
        self.ids.append(ahead.mark(row))
        self.unknown = 1

    def know(self, token: int) -> None:
        """What the mark stands for."""
        self.ids[-1] = token
        self.unknown = 0


Share = tuple[Context, int]
"""A context and how many of its next tokens take part in a step."""


class Runner:
    """The fast path of a base. The engine's thread alone calls it; reading adapters (`sites.read`) is anybody's."""

    def __init__(
        self,
        model: Any,
        *,
        kv_tokens: int,
        adapter_gib: float = ADAPTER_GIB,
        host_gib: float = HOST_GIB,
        make_bare: Callable[[], None] = lambda: None,
        kernels: bool | None = None,
    ) -> None:
        """`kv_tokens` is the room for keys and values, `adapter_gib` that for adapters on a GPU, `host_gib` that in pinned
        memory beside it. `make_bare` is called before each step: other adapters on the model must not act in it. `kernels` are
        Triton's, which is the way on a GPU (None). Raises ValueError for a model that packed steps can't express (`reach_of`)."""
        self.reach = reach_of(model)
        if not self.reach:
            raise ValueError("packed steps can't express the model's attention")
        self.pages = Pages(kv_tokens // PAGE, PAGE)
        self._store = KeyValues(self.pages.count * PAGE)
        self.drawn = torch.zeros(ahead.MOST, dtype=torch.int32, device=model.device)
        has_kernels = model.device.type == "cuda" if kernels is None else kernels
        self._compute = _compute(model, self._store, self.drawn, self.reach, adapter_gib, host_gib, make_bare, has_kernels)
        self.sites = self._compute.sites
        self.slots = self._compute.slots

    @property
    def kv_tokens(self) -> int:
        """Most tokens that one request may come to."""
        return self.pages.count * PAGE

    @property
    def form(self) -> str:
        """How this base is computed, in a sentence."""
        return self._compute.form

    @property
    def is_asynchronous(self) -> bool:
        """Whether `step` returns before its logits are there."""
        return self._compute.is_asynchronous

    def warm_up(self, rows: int) -> None:
        """Compile what steps of up to `rows` requests need, before the first."""
        self._compute.warm_up(rows)

    def residence(self, weights: LoraWeights | None) -> Residence:
        """Whether a request for this adapter may begin. Where it may not yet, it is on its way to the GPU, or there is no room
        for it until another's requests have been answered."""
        return "here" if weights is None or self.slots is None else self.slots.ask(weights)

    def begin(self, context: Context) -> None:
        """Take up the pages that hold the beginning of its tokens already. The last token is always computed."""
        if context.weights is not None and self.slots is not None:
            self.slots.hold(context.weights)
        while (context.computed + PAGE) <= min(len(context.ids) - 1, context.known):
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
        if context.weights is not None and self.slots is not None:
            self.slots.let_go(context.weights)
        self.pages.give_back(context.pages)
        del context.chain[1:]
        context.pages, context.computed = [], 0

    def step(self, shares: Sequence[Share]) -> torch.Tensor:
        """Run reserved tokens; logits [len(shares), V] behind each share's last one. Nothing has moved where it raises."""
        ends = np.cumsum([count for _, count in shares])
        logits = self._compute.forward(shares, ends - 1)
        for context, count in shares:
            context.computed += count
            self._publish(context)
        return logits

    def score(self, sequences: Sequence[list[int]], weights: LoraWeights | None) -> list[torch.Tensor]:
        """Logits [tokens, V] behind every token of each sequence, by one step that takes no room of running requests."""
        shares: list[Share] = []
        used = 0
        for ids in sequences:
            needed = self.pages.needed(len(ids))
            shares.append((Context(ids, weights, [b""], list(range(used, used + needed))), len(ids)))
            used += needed
        logits = self._compute.score(shares, KeyValues(used * PAGE))
        return list(logits.split([len(ids) for ids in sequences]))

    def _publish(self, context: Context) -> None:
        # A page whose tokens are not all known is published a step later.
        while (done := (len(context.chain) - 1) * PAGE) + PAGE <= min(context.computed, context.known):
            key = chain_key(context.chain[-1], context.ids[done : done + PAGE])
            self.pages.publish(context.pages[done // PAGE], key)
            context.chain.append(key)


def _compute(
    model: Any,
    store: KeyValues,
    drawn: torch.Tensor,
    reach: int,
    adapter_gib: float,
    host_gib: float,
    make_bare: Callable[[], None],
    with_kernels: bool,
) -> "PlainCompute | DeviceCompute":
    if not with_kernels:
        return PlainCompute(model, store, drawn, page=PAGE, make_bare=make_bare)
    from core.infer.gpu.compute import DeviceCompute  # Triton comes with torch for a GPU only

    room = {"adapter_gib": adapter_gib, "host_gib": host_gib}
    return DeviceCompute(model, store, drawn, page=PAGE, reach=reach, make_bare=make_bare, **room)


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
