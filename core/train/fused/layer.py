"""A decoder layer of Llama, Qwen2, Qwen3, GLM or GLM-4 over packed rows, on the modules of transformers' own layer.

For each token it keeps its input, queries, keys and values, attention's result, what that adds up to, gate and up; GLM-4 two
more of the residual stream's width for the norms of what is added, Qwen3 queries and keys as they were before their norm.
Transformers' layer with peft's LoRA keeps about twice as much.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from core.train.fused.elementwise import Elementwise
from core.train.fused.ends import Gate, Heads, Norm, Straight, Whole
from core.train.fused.projection import ADAPTER, Projection


@dataclass(frozen=True)
class Family:
    """How the layers of a model_type differ from Llama's."""

    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    paired: bool = False
    """Rotary pairs stand side by side."""
    head_norms: bool = False
    """Queries and keys are normed head by head."""
    norms_after: bool = False
    """What attention and gate add to the residual stream is normed before."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norms=True),
    "glm": Family(gate_up=("gate_up_proj",), paired=True),
    "glm4": Family(gate_up=("gate_up_proj",), paired=True, norms_after=True),
}
"""By model_type in config.json."""


def projections_of(layer: Any, family: Family) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Linear modules of a layer that read one input: (queries, keys, values), (attention's output), (gate, up), (down)."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = [attention.q_proj, attention.k_proj, attention.v_proj]
    return heads, [attention.o_proj], [getattr(mlp, name) for name in family.gate_up], [mlp.down_proj]


class FusedLayer:
    """Takes the place of a layer's forward. No module: the model's modules and their names stay what they are."""

    def __init__(self, layer: Any, family: Family, ops: Elementwise) -> None:
        self.layer = layer
        self._attention, self._family, self._ops = layer.self_attn, family, ops
        config, size = self._attention.config, self._attention.head_dim
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        self._norms = (self._attention.q_norm, self._attention.k_norm) if family.head_norms else None
        self._counts = (queries, keys)
        epsilon = self._norms[0].variance_epsilon if self._norms else None
        heads = Heads(queries, keys, size, paired=family.paired, epsilon=epsilon, ops=ops)
        groups = projections_of(layer, family)
        self._heads = Projection(groups[0], Norm(layer.input_layernorm, ops), heads, passes_on=True)
        self._output = Projection(groups[1], Straight(), Whole())
        self._gate_up = Projection(groups[2], Norm(layer.post_attention_layernorm, ops), Whole(), passes_on=True)
        self._down = Projection(groups[3], Gate(ops), Whole())
        self._adapted = next((module for group in groups for module in group if isinstance(module, LoraLayer)), None)

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """[1, N, hidden] -> the same, as the layer's own forward. Whatever is no batch of packed rows goes through that one:
        answers from a cache, padded rows, another adapter or none."""
        if arguments or options.get("cu_seq_lens_q") is None or options.get("past_key_values") is not None or not self._is_on():
            return type(self.layer).forward(self.layer, hidden_states, *arguments, **options)
        return self._packed(hidden_states, **options)

    def part(self) -> None:
        """Give the layer's modules memory of their own again."""
        for projection in (self._heads, self._output, self._gate_up, self._down):
            projection.part()

    def _packed(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: None = None,
        **options: Any,
    ) -> torch.Tensor:
        assert position_embeddings is not None
        queries, keys, values, x = self._heads(hidden_states[0], *position_embeddings, *self._head_scale())
        attended, _ = self._attend()(
            self._attention,
            queries,
            keys,
            values,
            attention_mask,
            dropout=0.0,
            scaling=self._attention.scaling,
            **options,
        )
        (plus,) = self._output(attended[0].flatten(1))
        both, x = self._gate_up(x, plus=self._normed_after("post_self_attn_layernorm", plus))
        (plus,) = self._down(both)
        return (x + self._normed_after("post_mlp_layernorm", plus))[None]

    def _is_on(self) -> bool:
        adapted = self._adapted
        return adapted is None or (adapted.active_adapters == [ADAPTER] and not adapted.disable_adapters and not adapted.merged)

    def _attend(self) -> Callable[..., tuple[torch.Tensor, Any]]:
        name = self._attention.config._attn_implementation
        if name not in ALL_ATTENTION_FUNCTIONS:
            raise ValueError(f"packed rows need an attention that knows their bounds, not {name!r}")
        found: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[name]
        return found

    def _head_scale(self) -> tuple[torch.Tensor, ...]:
        """One row for each head of queries and keys."""
        if self._norms is None:
            return ()
        return (torch.cat([norm.weight.expand(count, -1) for norm, count in zip(self._norms, self._counts, strict=True)]),)

    def _normed_after(self, name: str, plus: torch.Tensor) -> torch.Tensor:
        if not self._family.norms_after:
            return plus
        normed: torch.Tensor = _Normed.apply(self._ops, getattr(self.layer, name), plus, getattr(self.layer, name).weight)
        return normed


class _Normed(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a token."""

    @staticmethod
    def forward(ctx: Any, ops: Elementwise, module: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        norm = Norm(module, ops)
        x, scale = x.detach(), scale.detach()
        result, inverse = norm.forward(x, scale, x.dtype)
        ctx.save_for_backward(x, scale, inverse)
        ctx.norm = norm
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, scale, inverse = ctx.saved_tensors
        of_scale = None
        if ctx.needs_input_grad[3]:
            of_scale = ctx.norm.backward_scale(gradient, x, scale, inverse)
        return None, None, ctx.norm.backward(gradient, x, scale, inverse, None), of_scale
