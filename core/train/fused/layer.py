"""A decoder layer of Llama, Qwen2, Qwen3, GLM or GLM-4 over packed rows, on the modules of transformers' own layer.

It is one autograd function, because what autograd sees it keeps. For each token it keeps its input, queries, keys and values,
the sum behind attention, gate and up; GLM-4 two more of the residual stream's width for the norms of what is added, Qwen3
queries and keys as they were before their norm. Attention's result is kept where rows are long, and made again where they are
short and that costs next to nothing. A checkpointed layer keeps its input alone, or nothing where the host keeps it.
"""

from typing import Any

import torch

from core.models.families import Family
from core.train.fused.adapters import Adapters
from core.train.fused.elementwise import Elementwise
from core.train.fused.halves import AttentionHalf, Batch, MlpHalf
from core.train.fused.offload import HostStreams
from core.train.fused.projection import ADAPTER

ATTENDED_AGAIN = 1024
"""Tokens of the longest row up to which attention runs twice instead of being kept: at 130 it is 1% of a 7B's products."""


class FusedLayer:
    """Takes the place of a layer's forward. No module: the model's modules and their names stay what they are.

    `recomputed` keeps the input alone; with `host` it waits there together with the sum behind attention, which saves
    making that again.
    """

    def __init__(
        self,
        layer: Any,
        family: Family,
        ops: Elementwise,
        adapters: Adapters,
        *,
        is_first: bool,
        recomputed: bool = False,
        host: HostStreams | None = None,
    ) -> None:
        self.layer = layer
        self.recomputed, self.host = recomputed, host
        self.adapters, self.is_first = adapters, is_first
        self.attention = AttentionHalf(layer, family, ops, adapters)
        self.mlp = MlpHalf(layer, family, ops, adapters)
        self.factors = (*self.attention.factors(), *self.mlp.factors())
        self._adapted = self.attention.adapted or self.mlp.adapted
        self.places: tuple[int, ...] = () if host is None else (host.new_place(), host.new_place())

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """[1, N, hidden] -> the same, as the layer's own forward. Whatever is no batch of packed rows goes through that one:
        answers from a cache, padded rows, another adapter or none."""
        if arguments or options.get("cu_seq_lens_q") is None or options.get("past_key_values") is not None or not self.is_on():
            return type(self.layer).forward(self.layer, hidden_states, *arguments, **options)
        return self._packed(hidden_states, **options)

    def is_on(self) -> bool:
        """Whether the adapter that trains is the one that counts."""
        adapted = self._adapted
        return adapted is None or (adapted.active_adapters == [ADAPTER] and not adapted.disable_adapters and not adapted.merged)

    def part(self) -> None:
        """Give the layer's modules memory of their own again."""
        self.attention.part()
        self.mlp.part()

    def _packed(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: None = None,
        **options: Any,
    ) -> torch.Tensor:
        assert position_embeddings is not None
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
        turn = (position_embeddings[0].detach(), position_embeddings[1].detach())
        batch = Batch(dtype, turn, attention_mask, options)
        if self.is_first:
            self.adapters.refresh(dtype)
            if torch.is_grad_enabled():
                self.adapters.lay_gradients()
        given = (*self.attention.given(dtype), *self.mlp.given(dtype))
        result: torch.Tensor = _Layer.apply(self, batch, torch.is_grad_enabled(), hidden_states.squeeze(0), *given, *self.factors)
        return result[None]


class _Layer(torch.autograd.Function):
    """Attention, then the MLP. `tensors` are what may have a gradient: `given` of both halves, then their `factors`."""

    @staticmethod
    def forward(
        ctx: Any, layer: FusedLayer, batch: Batch, trains: bool, x: torch.Tensor, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        given = tensors[: layer.attention.width + layer.mlp.width]
        # Detached, so that the element-wise functions are compiled once, whether or not a gradient is asked for.
        x, given = x.detach(), tuple(None if part is None else part.detach() for part in given)
        first, second = given[: layer.attention.width], given[layer.attention.width :]
        ctx.layer, ctx.batch = layer, batch
        if layer.recomputed or not trains:
            middle, _, _ = layer.attention.forward(x, first, batch, with_graph=False)
            assert middle is not None
            if trains and layer.host is not None:
                for place, part in zip(layer.places, (x, middle), strict=True):
                    layer.host.send(place, part)
            ctx.save_for_backward(None if layer.host is not None else x, *given)
            return layer.mlp.through(middle, second, batch)
        longest = batch.options.get("max_length_q")
        is_long = longest is None or longest > ATTENDED_AGAIN
        middle, of_attention, ctx.attended = layer.attention.forward(x, first, batch, with_graph=is_long)
        assert middle is not None
        result, of_mlp = layer.mlp.forward(middle, second, batch)
        ctx.counts = (len(given), len(of_attention))
        ctx.save_for_backward(x, middle, *given, *of_attention, *of_mlp)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        layer: FusedLayer = ctx.layer
        attention, mlp, batch = layer.attention, layer.mlp, ctx.batch
        split = attention.width
        wants_x, wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[4 : 4 + split + mlp.width]
        if not layer.recomputed:
            x, middle, *others = ctx.saved_tensors
            given, kept = others[: ctx.counts[0]], others[ctx.counts[0] :]
            of_attention, of_mlp = kept[: ctx.counts[1]], kept[ctx.counts[1] :]
            of_middle, second = mlp.backward(gradient, middle, tuple(given[split:]), tuple(of_mlp), batch, wanted[split:])
            _let_go(middle, *of_mlp)
            attended, ctx.attended = ctx.attended, None
        else:
            x, *given = ctx.saved_tensors
            middle = of_attention = attended = None
            if layer.host is not None:
                middle = layer.host.fetch(layer.places[1])
            else:
                middle, of_attention, attended = attention.forward(x, tuple(given[:split]), batch, with_graph=True)
            of_middle, second = mlp.backward_again(gradient, middle, tuple(given[split:]), batch, wanted[split:])
            del middle
            if layer.host is not None:
                x = layer.host.fetch(layer.places[0])
                _, of_attention, attended = attention.forward(x, tuple(given[:split]), batch, with_graph=True, to_sum=False)
        of_x, first = attention.backward(
            of_middle, x, tuple(given[:split]), tuple(of_attention), attended, batch, wanted[:split], wants_x=wants_x
        )
        attention.leave(first)
        mlp.leave(second)
        return None, None, None, of_x, *first, *second, *(None for _ in layer.factors)


def _let_go(*tensors: torch.Tensor | None) -> None:
    """Give back the memory of what only the MLP's way back has read. Autograd holds what was saved until the function returns,
    and attention's way back, which comes before that, needs as much as gate and up."""
    for tensor in tensors:
        if tensor is not None:
            tensor.untyped_storage().resize_(0)
