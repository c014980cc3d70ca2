"""Attention of a packed step: tokens of many requests in one row, each seeing its own request's pages and no other.

Registered with transformers as an attention implementation, so that the model classes run unchanged; where tokens belong
comes with the step as the argument `paged`, which answers. `PagedStep` walks the requests one by one with torch's attention,
on any device: the definition, without padding, and what a request gets does not depend on the requests beside it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PAGED = "strop_paged"
"""Name of the attention implementation."""


@dataclass
class KeyValues:
    """Keys and values of every page, a pair of tensors [slots, H_kv, D] a layer; slot = page × page size + offset.

    Made at a layer's first step, whose keys say what their shape and dtype are. A CPU gives the memory as it is written.
    """

    slots: int
    _layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """`keys` and `values` [T, H_kv, D] go to `slots` int64 [T]."""
        kept_keys, kept_values = self.at(layer, *keys.shape[1:], like=keys)
        kept_keys[slots] = keys
        kept_values[slots] = values

    def at(self, layer: int, heads: int, width: int, *, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer [slots, H_kv, D], made where they are not there yet, on the device and of the dtype of
        `like`."""
        if layer not in self._layers:
            self._layers[layer] = (like.new_empty(self.slots, heads, width), like.new_empty(self.slots, heads, width))
        return self._layers[layer]

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of a layer that has been written to."""
        return self._layers[layer]

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H_kv, len(slots), D] of a context."""
        keys, values = self._layers[layer]
        # On a CPU half the time of indexing.
        return keys.index_select(0, slots).transpose(0, 1), values.index_select(0, slots).transpose(0, 1)


@dataclass(frozen=True)
class Span:
    """A request's share of a step: its tokens are rows `begin` to `end`, its whole context up to then lies in `slots`."""

    begin: int
    end: int
    slots: torch.Tensor


class Paged(Protocol):
    """A step, as attention asks it."""

    def write_and_attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query [T, H, D], key and value [T, H_kv, D] of the step's tokens -> [T, H, D]."""
        ...


@dataclass(frozen=True)
class PagedStep:
    """Where the tokens of a step belong: `written` int64 [T] is the slot of each."""

    written: torch.Tensor
    spans: Sequence[Span]
    store: KeyValues

    def write_and_attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.store.write(layer, self.written, key, value)
        query = query.transpose(0, 1)[None]
        has_groups = query.shape[1] != key.shape[1]
        parts = []
        for span in self.spans:
            keys, values = self.store.read(layer, span.slots)
            asked, there = span.end - span.begin, len(span.slots)
            mask = None
            if 1 < asked < there:  # the later part of a prompt: all that is before it, and itself up to each token
                mask = torch.ones(asked, there, dtype=torch.bool, device=query.device).tril(there - asked)
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, span.begin : span.end],
                    keys[None],
                    values[None],
                    attn_mask=mask,
                    is_causal=asked == there,
                    scale=scale,
                    enable_gqa=has_groups,
                )
            )
        return torch.cat(parts, dim=2)[0].transpose(0, 1)


@contextmanager
def paged_attention(model: Any) -> Iterator[None]:
    """Within the block the model expects packed steps; outside it attends as it was loaded."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = PAGED
    try:
        yield
    finally:
        model.config._attn_implementation = usual


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    paged: Paged | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D]."""
    if paged is None:
        raise ValueError(f"{type(module).__name__} does not hand the places of a packed step to its attention")
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return paged.write_and_attend(layer, query, key, value, scale)[None], None


AttentionInterface.register(PAGED, _attend)
