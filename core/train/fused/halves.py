"""The two halves of a decoder layer, attention and MLP: each adds to the residual stream what it makes of it.

Plain functions, forward and backward, that autograd doesn't see; `layer.py` is what it sees. H is the model's hidden size, N
is tokens. Everything that may have a gradient comes in one tuple, `given`, and goes back as one of the same length.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from core.models.families import Family, projections_of
from core.models.joined import Weight
from core.train.fused.adapters import Adapters
from core.train.fused.elementwise import Elementwise
from core.train.fused.ends import Gate, Heads, Norm, Straight, Whole
from core.train.fused.projection import Kept, Parameters, Projection

Tensors = tuple[torch.Tensor | None, ...]
_OWN = len(Parameters._fields)
_CHUNK = 3072
"""Tokens that go through an MLP at once where its layer is made again: more would only take more room."""


@dataclass(frozen=True)
class Batch:
    """What a layer is told beside the residual stream."""

    dtype: torch.dtype
    turn: tuple[torch.Tensor, torch.Tensor]
    """Cosines and sines [1, N, R]."""
    mask: torch.Tensor | None
    options: dict[str, Any]
    """Where rows begin and end, as transformers hands it on to an attention."""


@dataclass
class Attended:
    """Attention as autograd has it: queries, keys and values, and its result [N, heads * size] with a way back to them."""

    leaves: list[torch.Tensor]
    result: torch.Tensor

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of queries, keys and values, which are let go, whoever else holds this: what follows needs the room."""
        found = torch.autograd.grad(self.result, self.leaves, gradient)
        self.leaves, self.result = [], gradient.new_empty(0)
        return found


class _Half:
    """What both have: two projections, one behind the other."""

    def __init__(self, first: Projection, second: Projection) -> None:
        self._projections = (first, second)

    def factors(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(factor for projection in self._projections for factor in projection.factors())

    def leave(self, found: Tensors) -> None:
        """Add to the gradients of `factors`, from those of `given`."""
        for projection, part in zip(self._projections, _parts(found)[:2], strict=True):
            projection.leave(part)

    def part(self) -> None:
        """Give the modules memory of their own again."""
        for projection in self._projections:
            projection.part()


class AttentionHalf(_Half):
    """x [N, H] -> x + attention(norm(x)) [N, H]."""

    width = 2 * _OWN + 2
    """Of `given`."""

    def __init__(self, layer: Any, family: Family, ops: Elementwise, adapters: Adapters) -> None:
        self._module, config = layer.self_attn, layer.self_attn.config
        self._counts = (config.num_attention_heads, config.num_key_value_heads)
        self._norms = (self._module.q_norm, self._module.k_norm) if family.head_norms else None
        epsilon = self._norms[0].variance_epsilon if self._norms else None
        heads = Heads(*self._counts, self._module.head_dim, paired=family.paired, epsilon=epsilon, ops=ops)
        groups = projections_of(layer, family)
        self._heads = Projection(groups[0], Norm(layer.input_layernorm, ops), heads, adapters, ops)
        self._output = Projection(groups[1], Straight(), Whole(), adapters, ops)
        super().__init__(self._heads, self._output)
        self._last = Norm(layer.post_self_attn_layernorm, ops) if family.norms_after else None
        self.adapted = _first_adapted(groups[0] + groups[1])

    def given(self, dtype: torch.dtype) -> Tensors:
        last = None if self._last is None else self._last.scale
        return (*self._heads.parameters(dtype), *self._output.parameters(dtype), self._head_scale(), last)

    def forward(
        self, x: torch.Tensor, given: Tensors, batch: Batch, *, with_graph: bool, to_sum: bool = True
    ) -> tuple[torch.Tensor | None, Tensors, Attended | None]:
        """(x + what is added, what is kept, attention as autograd has it if that is asked for).

        The sum is None where it is not asked for and not needed: that saves a product."""
        of_heads, of_output, head_scale, scale = _parts(given)
        (queries, keys, values), kept = self._heads.forward(x, of_heads, batch.dtype, *batch.turn, *_if_any(head_scale))
        attended = None
        if with_graph:
            attended = self._attended(queries, keys, values, batch)
            result = attended.result.detach()
            parts: Tensors = (None, None, None)  # which it keeps itself
        else:
            result = self._attend(queries, keys, values, batch)
            parts = (queries, keys, values)
        straight, inverse = kept.after or (None, None)
        found = (kept.before, kept.reduced, straight, inverse, *parts)
        if not to_sum and self._last is None:
            return None, (*found, None, None, None), attended
        total, kept_output, of_last = _added_to(x, self._output, result, of_output, batch.dtype, self._last, scale)
        return total, (*found, kept_output.reduced, *of_last), attended

    def backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        given: Tensors,
        kept: Tensors,
        attended: Attended | None,
        batch: Batch,
        wanted: Sequence[bool],
        *,
        wants_x: bool,
    ) -> tuple[torch.Tensor | None, Tensors]:
        """(gradient of x, those of `given`). Attention is made again where it was not kept."""
        of_heads, of_output, head_scale, scale = _parts(given)
        before, reduced, straight, inverse, queries, keys, values, reduced_output, plus, plus_inverse = kept
        if attended is None:
            assert queries is not None
            assert keys is not None
            assert values is not None
            attended = self._attended(queries, keys, values, batch)
        of_plus, of_scale = _normed_back(self._last, gradient.to(batch.dtype), plus, scale, plus_inverse, wanted[-1])
        of_result, found_output, _ = self._output.backward(
            (of_plus,), attended.result.detach(), of_output, Kept(None, reduced_output), wanted[_OWN : 2 * _OWN], batch.dtype
        )
        assert of_result is not None
        parts = attended.backward(of_result)
        del attended, of_result, of_plus, queries, keys, values
        kept_after = () if straight is None or inverse is None else (straight, inverse)
        of_x, found_heads, of_head_scale = self._heads.backward(
            parts,
            x,
            of_heads,
            Kept(before, reduced, kept_after),
            wanted[:_OWN],
            batch.dtype,
            *batch.turn,
            *_if_any(head_scale),
            further=gradient,
            wants_x=wants_x,
        )
        return of_x, (*found_heads, *found_output, of_head_scale, of_scale)

    def _attended(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch) -> Attended:
        leaves = [part.detach().requires_grad_() for part in (queries, keys, values)]
        with torch.enable_grad():
            return Attended(leaves, self._attend(leaves[0], leaves[1], leaves[2], batch))

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        name = self._module.config._attn_implementation
        if name not in ALL_ATTENTION_FUNCTIONS:
            raise ValueError(f"packed rows need an attention that knows their bounds, not {name!r}")
        attend: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[name]
        scaling = self._module.scaling
        found, _ = attend(self._module, queries, keys, values, batch.mask, dropout=0.0, scaling=scaling, **batch.options)
        return found.squeeze(0).flatten(1)

    def _head_scale(self) -> torch.Tensor | None:
        """One row for each head of queries and keys."""
        if self._norms is None:
            return None
        return torch.cat([norm.weight.expand(count, -1) for norm, count in zip(self._norms, self._counts, strict=True)])


class MlpHalf(_Half):
    """x [N, H] -> x + down(silu(gate) * up) of norm(x) [N, H]."""

    width = 2 * _OWN + 1

    def __init__(self, layer: Any, family: Family, ops: Elementwise, adapters: Adapters) -> None:
        groups = projections_of(layer, family)
        self._gate_up = Projection(groups[2], Norm(layer.post_attention_layernorm, ops), Whole(), adapters, ops)
        self._down = Projection(groups[3], Gate(ops), Whole(), adapters, ops)
        super().__init__(self._gate_up, self._down)
        self._last = Norm(layer.post_mlp_layernorm, ops) if family.norms_after else None
        self.adapted = _first_adapted(groups[2] + groups[3])

    def given(self, dtype: torch.dtype) -> Tensors:
        last = None if self._last is None else self._last.scale
        return (*self._gate_up.parameters(dtype), *self._down.parameters(dtype), last)

    def forward(
        self, x: torch.Tensor, given: Tensors, batch: Batch, weights: tuple[Weight | None, Weight | None] = (None, None)
    ) -> tuple[torch.Tensor, Tensors]:
        """(x + what is added, what is kept)."""
        of_gate_up, of_down, scale = _parts(given)
        (both,), kept = self._gate_up.forward(x, of_gate_up, batch.dtype, weight=weights[0])
        total, kept_down, of_last = _added_to(x, self._down, both, of_down, batch.dtype, self._last, scale, weights[1])
        return total, (kept.before, kept.reduced, both, kept_down.reduced, *of_last)

    def backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        given: Tensors,
        kept: Tensors,
        batch: Batch,
        wanted: Sequence[bool],
        weights: tuple[Weight | None, Weight | None] = (None, None),
    ) -> tuple[torch.Tensor, Tensors]:
        """(gradient of x, those of `given`). Gate and up are written over."""
        of_gate_up, of_down, scale = _parts(given)
        before, reduced, both, reduced_down, plus, plus_inverse = kept
        assert both is not None
        of_plus, of_scale = _normed_back(self._last, gradient.to(batch.dtype), plus, scale, plus_inverse, wanted[-1])
        of_both, found_down, _ = self._down.backward(
            (of_plus,), both, of_down, Kept(None, reduced_down), wanted[_OWN : 2 * _OWN], batch.dtype, weight=weights[1]
        )
        assert of_both is not None
        of_x, found_gate_up, _ = self._gate_up.backward(
            (of_both,),
            x,
            of_gate_up,
            Kept(before, reduced),
            wanted[:_OWN],
            batch.dtype,
            further=gradient,
            weight=weights[0],
        )
        assert of_x is not None
        return of_x, (*found_gate_up, *found_down, of_scale)

    def through(self, x: torch.Tensor, given: Tensors, batch: Batch) -> torch.Tensor:
        """As `forward`, of which nothing is kept: a chunk of tokens after the other."""
        weights = self._at_hand(batch)
        found = torch.empty_like(x)
        for part, result in zip(_chunks(x), _chunks(found), strict=True):
            result.copy_(self.forward(part, given, batch, weights)[0])
        return found

    def backward_again(
        self, gradient: torch.Tensor, x: torch.Tensor, given: Tensors, batch: Batch, wanted: Sequence[bool]
    ) -> tuple[torch.Tensor, Tensors]:
        """As `forward` and `backward`, a chunk of tokens after the other. The product that ends the half isn't made again, for
        nobody needs it but a norm behind it. In one chunk where weights train: their gradients are no small sums."""
        of_gate_up, of_down, _ = _parts(given)
        is_whole = of_gate_up.weight is not None or of_down.weight is not None
        weights = self._at_hand(batch)
        found = torch.empty_like(x)
        sums: list[torch.Tensor | None] = [None] * len(given)
        parts = [[x], [gradient], [found]] if is_whole else [_chunks(x), _chunks(gradient), _chunks(found)]
        for part, of_sum, result in zip(*parts, strict=True):
            if self._last is None:
                (both,), kept_gate = self._gate_up.forward(part, of_gate_up, batch.dtype, weight=weights[0])
                kept: Tensors = (kept_gate.before, kept_gate.reduced, both, None, None, None)
                del both
            else:
                _, kept = self.forward(part, given, batch, weights)
            of_part, gradients = self.backward(of_sum, part, given, kept, batch, wanted, weights)
            result.copy_(of_part)
            del kept, of_part
            sums = [_added(one, other, exactly=len(parts[0]) > 1) for one, other in zip(sums, gradients, strict=True)]
        return found, tuple(sums)

    def _at_hand(self, batch: Batch) -> tuple[Weight, Weight]:
        return self._gate_up.at_hand(batch.dtype), self._down.at_hand(batch.dtype)


def _parts(given: Tensors) -> tuple[Any, ...]:
    """(parameters of the first projection, of the second, what else there is)."""
    return Parameters(*given[:_OWN]), Parameters(*given[_OWN : 2 * _OWN]), *given[2 * _OWN :]


def _chunks(x: torch.Tensor) -> list[torch.Tensor]:
    count = max(1, math.ceil(len(x) / _CHUNK))
    return list(x.split(math.ceil(len(x) / count)))


def _added_to(
    x: torch.Tensor,
    projection: Projection,
    source: torch.Tensor,
    given: Parameters,
    dtype: torch.dtype,
    norm: Norm | None,
    scale: Any,
    weight: Weight | None = None,
) -> tuple[torch.Tensor, Kept, Tensors]:
    """(x + what the projection makes of `source`, what it keeps, what the norm of what is added keeps)."""
    if norm is None and x.dtype == dtype:
        (total,), kept = projection.forward(source, given, dtype, plus=x, weight=weight)
        return total, kept, (None, None)
    (plus,), kept = projection.forward(source, given, dtype, weight=weight)
    if norm is None:
        return x + plus, kept, (None, None)
    normed, inverse = norm.forward(plus, scale, plus.dtype)
    return x + normed, kept, (plus, inverse)


def _added(one: torch.Tensor | None, other: torch.Tensor | None, *, exactly: bool) -> torch.Tensor | None:
    """Sums over chunks are in fp32, as are those over micro-batches."""
    if other is None:
        return one
    if one is None:
        return other.float() if exactly else other
    return one.add_(other)


def _normed_back(
    norm: Norm | None, gradient: torch.Tensor, plus: Any, scale: Any, inverse: Any, wants_scale: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if norm is None:
        return gradient, None
    of_scale = norm.backward_scale(gradient, plus, scale, inverse) if wants_scale else None
    return norm.backward(gradient, plus, scale, inverse, None)[0], of_scale


def _if_any(tensor: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if tensor is None else (tensor,)


def _first_adapted(modules: list[Any]) -> LoraLayer | None:
    return next((module for module in modules if isinstance(module, LoraLayer)), None)
