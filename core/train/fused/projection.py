"""Linear layers that read one input as one matrix product, with their LoRA and what stands before and after it.

Kept for the backward pass is the input of all that, and next to nothing else: a norm's or a gate's result is made again from
it, a quantised weight is dequantised again. N is tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer

from core.models import start
from core.models.fp8 import Functions8bit
from core.models.joined import Dense, Weight, join_weights, part_weights, plain_layer, why_not_one
from core.train.fused.adapters import Adapters, Place, Stacked
from core.train.fused.elementwise import Elementwise
from core.train.fused.ends import After, Before

ADAPTER = "default"
"""Name of the adapter that trains."""


class Parameters(NamedTuple):
    """What of a projection may have a gradient, and after the way back those gradients."""

    scale: torch.Tensor | None = None
    """Of the norm before it."""
    weight: torch.Tensor | None = None
    """Only where it is trained; what is multiplied with is the projection's own."""
    bias: torch.Tensor | None = None
    down: torch.Tensor | None = None
    """LoRA's A of all modules, one below the other [R, inputs], in the compute dtype."""
    up: torch.Tensor | None = None
    """Their scaled B on a diagonal [outputs, R]."""


class Kept(NamedTuple):
    """Between the passes, beside the input and the parameters."""

    before: torch.Tensor | None = None
    reduced: torch.Tensor | None = None
    """What A gives, [N, R]; made again where it is None."""
    after: tuple[torch.Tensor, ...] = ()


class Projection:
    """Linear modules of a model, with or without LoRA on them, that read the same input.

    From the moment it is made until `part`, the modules' weights are views of one matrix. Both passes are plain functions
    that autograd doesn't see (`layer.py` is what it sees). Raises ValueError for modules that can't be one matrix.
    """

    def __init__(
        self, modules: Sequence[torch.nn.Module], before: Before, after: After, adapters: Adapters, ops: Elementwise
    ) -> None:
        self._modules = tuple(modules)
        self._weight, self._bias = join_weights(modules, Functions8bit(ops.rows_in_8_bits, ops.scaled_in_8_bits, ops.turned_over))
        self._before, self._after = before, after
        self._outputs = [plain_layer(module).out_features for module in modules]
        self._adapted, self._places = self._places_of()
        parts = [part[ADAPTER] for module in self._adapted for part in (module.lora_A, module.lora_B)]
        self._stacked: Stacked | None = None
        ranks = {place.ranks.stop - place.ranks.start for place in self._places}
        if len(ranks) == 1 and all(isinstance(part, torch.nn.Linear) for part in parts):
            factors = tuple(part.weight for part in parts)
            self._stacked = adapters.add(Stacked(tuple(self._places), factors, sum(self._outputs)))

    def parameters(self, dtype: torch.dtype) -> Parameters:
        """With a way back to the modules' own for their gradients."""
        weight = self._weight.trained() if isinstance(self._weight, Dense) else None
        bias = None
        if self._bias is not None:
            trained = self._bias.trained()
            bias = self._bias.joined if trained is None else trained
        return Parameters(self._before.scale, weight, bias, *self._adapters(dtype))

    def at_hand(self, dtype: torch.dtype) -> Weight:
        """The weight in `dtype`, for several products in a row."""
        return self._weight.at_hand(dtype)

    def forward(
        self,
        x: torch.Tensor,
        given: Parameters,
        dtype: torch.dtype,
        *turn: torch.Tensor,
        plus: torch.Tensor | None = None,
        weight: Weight | None = None,
    ) -> tuple[tuple[torch.Tensor, ...], Kept]:
        """after((z W^T + b) + (z A^T) B^T + `plus`) with z = before(x), x [N, inputs]. `turn` goes to `after`."""
        z, kept_before = self._before.forward(x, given.scale, dtype)
        reduced = thin = None
        if given.bias is not None:
            plus = given.bias.to(dtype) if plus is None else plus + given.bias.to(dtype)
        if given.down is not None and given.up is not None:
            reduced = z @ given.down.t()
            thin = (reduced, given.up.t())
        y = (weight or self._weight).multiply(z, plus, thin)
        del z
        results, kept_after = self._after.forward(y, *turn)
        return results, Kept(kept_before, reduced, kept_after)

    def backward(
        self,
        gradients: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        given: Parameters,
        kept: Kept,
        wanted: Sequence[bool],
        dtype: torch.dtype,
        *turn: torch.Tensor,
        further: torch.Tensor | None = None,
        wants_x: bool = True,
        weight: Weight | None = None,
    ) -> tuple[torch.Tensor | None, Parameters, torch.Tensor | None]:
        """(gradient of x plus `further`, those of `given` that are `wanted`, that of `turn`'s). A gate's x is written over."""
        dy, of_turn = self._after.backward(gradients, kept.after, *turn)
        of_x = of_scale = of_weight = of_bias = of_down = of_up = of_reduced = z = None
        if given.bias is not None and wanted[2]:
            of_bias = dy.sum(0).to(given.bias.dtype)
        if given.up is not None:
            of_reduced = dy @ given.up
        if wants_x or wanted[0]:
            thin = None if of_reduced is None or given.down is None else (of_reduced, given.down)
            dz = (weight or self._weight).multiply_back(dy, thin)
            if wanted[0]:
                of_scale = self._before.backward_scale(dz, x, given.scale, kept.before)
            if wants_x:
                of_x, z = self._before.backward(dz, x, given.scale, kept.before, further)
            del dz
        if given.down is not None or given.weight is not None:
            if z is None:
                z = self._before.again(x, given.scale, kept.before, dtype)
            if given.down is not None and of_reduced is not None:
                of_up = dy.t() @ (z @ given.down.t() if kept.reduced is None else kept.reduced)
                of_down = of_reduced.t() @ z
            if given.weight is not None and wanted[1]:
                of_weight = (dy.t() @ z).to(given.weight.dtype)
        return of_x, Parameters(of_scale, of_weight, of_bias, of_down, of_up), of_turn

    def part(self) -> None:
        """Give the modules memory of their own again. The projection is of no use after that."""
        part_weights(self._modules, self._weight, self._bias)

    def factors(self) -> tuple[torch.nn.Parameter, ...]:
        """A and B of all modules where they are stacked for all micro-batches of a step."""
        return () if self._stacked is None else self._stacked.factors

    def leave(self, found: Parameters) -> None:
        """Add the gradients of stacked A and B to those of the modules' own."""
        if self._stacked is not None and found.down is not None and found.up is not None:
            self._stacked.add(found.down, found.up)

    def _adapters(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """All modules' A one below the other [R, inputs] and their scaled B on a diagonal [outputs, R]; None without any."""
        if self._stacked is not None:
            return self._stacked.down, self._stacked.up
        if not self._places:
            return None, None
        factors = [_factor(part[ADAPTER]) for module in self._adapted for part in (module.lora_A, module.lora_B)]
        stacked: tuple[torch.Tensor, torch.Tensor] = _Stack.apply(self._places, sum(self._outputs), dtype, *factors)
        return stacked

    def _places_of(self) -> tuple[list[Any], list[Place]]:
        """(modules with an adapter, where each stands)."""
        adapted, places = [], []
        row = rank = 0
        for module, outputs in zip(self._modules, self._outputs, strict=True):
            if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
                width = len(_factor(module.lora_A[ADAPTER]))
                places.append(Place(slice(row, row + outputs), slice(rank, rank + width), module.scaling[ADAPTER]))
                adapted.append(module)
                rank += width
            row += outputs
        return adapted, places


def why_no_projection(modules: Sequence[torch.nn.Module]) -> str | None:
    """What keeps linear modules from being a projection; None where nothing does."""
    for module in modules:
        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            continue
        pair = (module.lora_A[ADAPTER], module.lora_B[ADAPTER])
        if ADAPTER in module.lora_variant or not all(isinstance(part, torch.nn.Linear | start.Down | start.Up) for part in pair):
            return "its adapter is more than two matrices"
        if not isinstance(module.lora_dropout[ADAPTER], torch.nn.Identity):
            return "fused layers know no dropout"
        if getattr(pair[1], "bias", None) is not None:
            return "its adapter has biases"
    return why_not_one(modules)


def _factor(module: Any) -> torch.Tensor:
    # A start along the weight's own directions has a second, frozen half (core.models.start).
    factor: torch.Tensor = module.both() if isinstance(module, start.Down | start.Up) else module.weight
    return factor


class _Stack(torch.autograd.Function):
    """fp32 (A, B) of each module, in turn -> (A [R, inputs], B [outputs, R]) of all of them in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any, places: list[Place], outputs: int, dtype: torch.dtype, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        down = torch.cat(factors[0::2]).to(dtype)
        up = down.new_zeros(outputs, len(down))
        for place, factor in zip(places, factors[1::2], strict=True):
            up[place.outputs, place.ranks] = factor * place.scale
        ctx.places, ctx.dtype = places, factors[0].dtype
        return down, up

    @staticmethod
    def backward(ctx: Any, down: torch.Tensor, up: torch.Tensor) -> tuple[Any, ...]:
        found: list[torch.Tensor] = []
        for place in ctx.places:
            found.append(down[place.ranks].to(ctx.dtype))
            found.append(up[place.outputs, place.ranks].to(ctx.dtype) * place.scale)
        return None, None, None, *found
