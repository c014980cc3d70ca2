"""Linear layers that read one input as one matrix product, with their LoRA and what stands before and after it.

Kept for the backward pass is the input of all that, and next to nothing else: a norm's or a gate's result is made again from
it, a quantised weight is dequantised again. It is one autograd function because what autograd sees it keeps. N is tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from core.models import start
from core.train.fused.ends import After, Before
from core.train.fused.weights import Dense, Weight, join_weights, part_weights, plain_layer, why_not_one

ADAPTER = "default"
"""Name of the adapter that trains."""


class Projection:
    """Linear modules of a model, with or without LoRA on them, that read the same input.

    From the moment it is made until `part`, the modules' weights are views of one matrix. `passes_on` returns the input, too
    (with `plus` on it): who goes on with it hands its gradient back to where it is added without a pass of its own.
    Raises ValueError for modules that can't be one matrix.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], before: Before, after: After, *, passes_on: bool = False) -> None:
        self._modules = tuple(modules)
        self._weight, self._bias = join_weights(modules)
        self._plan = _Plan(self._weight, before, after, passes_on)
        self._outputs = [plain_layer(module).out_features for module in modules]

    def __call__(self, x: torch.Tensor, *turn: torch.Tensor, plus: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """x [N, inputs] -> what `after` makes of [N, outputs], then x + plus if it is passed on. `turn` goes to `after`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = self._weight.trained() if isinstance(self._weight, Dense) else None
        bias = None
        if self._bias is not None:
            trained = self._bias.trained()
            bias = self._bias.joined if trained is None else trained
        down, up = self._adapters(dtype)
        outputs: tuple[torch.Tensor, ...] = _Project.apply(
            self._plan, dtype, x, plus, self._plan.before.scale, weight, bias, down, up, *turn
        )
        return outputs

    def part(self) -> None:
        """Give the modules memory of their own again. The projection is of no use after that."""
        part_weights(self._modules, self._weight, self._bias)

    def _adapters(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """All modules' A one below the other [R, inputs] and their scaled B on a diagonal [outputs, R]; None without any."""
        places: list[_Place] = []
        factors: list[torch.Tensor] = []
        row = rank = 0
        for module, outputs in zip(self._modules, self._outputs, strict=True):
            if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
                pair = [_factor(part[ADAPTER]) for part in (module.lora_A, module.lora_B)]
                width = len(pair[0])
                places.append(_Place(slice(row, row + outputs), slice(rank, rank + width), module.scaling[ADAPTER]))
                factors += pair
                rank += width
            row += outputs
        if not places:
            return None, None
        stacked: tuple[torch.Tensor, torch.Tensor] = _Stack.apply(places, row, dtype, *factors)
        return stacked


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


@dataclass(frozen=True, eq=False)
class _Plan:
    weight: Weight
    before: Before
    after: After
    passes_on: bool


@dataclass(frozen=True)
class _Place:
    """Where a module's LoRA stands among that of its neighbours."""

    outputs: slice
    ranks: slice
    scale: float


def _factor(module: Any) -> torch.Tensor:
    # A start along the weight's own directions has a second, frozen half (core.models.start).
    factor: torch.Tensor = module.both() if isinstance(module, start.Down | start.Up) else module.weight
    return factor


class _Stack(torch.autograd.Function):
    """fp32 (A, B) of each module, in turn -> (A [R, inputs], B [outputs, R]) of all of them in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any, places: list[_Place], outputs: int, dtype: torch.dtype, *factors: torch.Tensor
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


class _Project(torch.autograd.Function):
    """after((z W^T + b) + (z A^T) B^T) with z = before(x + plus)."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        dtype: torch.dtype,
        x: torch.Tensor,
        plus: torch.Tensor | None,
        scale: torch.Tensor | None,
        weight: torch.Tensor | None,  # only where it is trained; what is multiplied with is the plan's
        bias: torch.Tensor | None,
        down: torch.Tensor | None,
        up: torch.Tensor | None,
        *turn: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.dtypes = (x.dtype, None if plus is None else plus.dtype)
        # Detached, so that the element-wise functions are compiled once, whether or not a gradient is asked for.
        total = x if plus is None else x + plus
        read = total.detach()
        scale = None if scale is None else scale.detach()
        z, kept_before = plan.before.forward(read, scale, dtype)
        y = plan.weight.multiply(z, None if bias is None else bias.to(dtype))
        reduced = None
        if down is not None and up is not None:
            reduced = z @ down.t()
            y.addmm_(reduced, up.t())
        results, kept_after = plan.after.forward(y, *(part.detach() for part in turn))
        ctx.multiplied_again = down is not None or weight is not None
        needs_input = plan.before.needs_input or ctx.multiplied_again
        ctx.save_for_backward(read if needs_input else None, scale, kept_before, bias, down, up, reduced, *kept_after)
        ctx.plan, ctx.dtype = plan, dtype
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.set_materialize_grads(False)
        return (*results, total) if plan.passes_on else results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        needs_x, needs_plus, needs_scale, needs_weight, needs_bias = ctx.needs_input_grad[2:7]
        x, scale, kept_before, bias, down, up, reduced, *kept_after = ctx.saved_tensors
        further = gradients[-1] if plan.passes_on else None
        dy, of_turn = plan.after.backward(gradients[:-1] if plan.passes_on else gradients, tuple(kept_after))
        of_x = of_plus = of_scale = of_weight = of_bias = of_down = of_up = None
        if needs_bias:
            of_bias = dy.sum(0).to(bias.dtype)
        if ctx.multiplied_again:
            z = plan.before.again(x, scale, kept_before, ctx.dtype)
            if down is not None:
                of_reduced = dy @ up
                of_up = dy.t() @ reduced
                of_down = of_reduced.t() @ z
            if needs_weight:
                of_weight = (dy.t() @ z).to(ctx.weight_dtype)
            del z  # as large as what follows
        if needs_x or needs_plus or needs_scale:
            dz = plan.weight.multiply_back(dy)
            if down is not None:
                dz.addmm_(of_reduced, down)
            if needs_scale:
                of_scale = plan.before.backward_scale(dz, x, scale, kept_before)
            if needs_x or needs_plus:
                of_sum = plan.before.backward(dz, x, scale, kept_before, further)
                of_x, of_plus = (
                    of_sum.to(dtype) if needed else None for dtype, needed in zip(ctx.dtypes, (needs_x, needs_plus), strict=True)
                )
        return None, None, of_x, of_plus, of_scale, of_weight, of_bias, of_down, of_up, *of_turn
