"""LoRA's matrices as fused layers multiply with them: stacked, scaled, in the compute dtype.

They are made once for each state of the weights, which is once an optimizer step, and not for every module of every
micro-batch: of a layer's kernels those were every third. R is the sum of a projection's ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """Where a module's LoRA stands among that of its neighbours."""

    outputs: slice
    ranks: slice
    scale: float


@dataclass(eq=False)
class Stacked:
    """The LoRA of one projection. Its modules' own A and B are what trains."""

    places: Sequence[Place]
    factors: tuple[torch.nn.Parameter, ...]
    """A and B of each module in turn."""
    outputs: int
    down: torch.Tensor | None = None
    """All A one below the other [R, inputs]."""
    up: torch.Tensor | None = None
    """All B, scaled, on a diagonal [outputs, R]."""
    scales: Sequence[torch.Tensor] = ()

    def lay_out(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Make room for all of them; the places of every A and of every B in it."""
        below = self.factors[0::2]
        if self.down is None or self.up is None or self.down.dtype != dtype:
            ranks, inputs = sum(len(factor) for factor in below), below[0].shape[1]
            self.down = below[0].new_empty(ranks, inputs, dtype=dtype)
            self.up = below[0].new_zeros(self.outputs, ranks, dtype=dtype)
            self.scales = [below[0].new_full((1,), place.scale, dtype=torch.float32) for place in self.places]
        downs = [self.down[place.ranks] for place in self.places]
        return downs, [self.up[place.outputs, place.ranks] for place in self.places]

    def gradients(self, down: torch.Tensor | None, up: torch.Tensor | None) -> list[torch.Tensor | None]:
        """From those of `down` and `up` to those of `factors`."""
        if down is None or up is None:
            return [None] * len(self.factors)
        wide = down.to(self.factors[0].dtype)
        found: list[torch.Tensor | None] = []
        for place, scale in zip(self.places, self.scales, strict=True):
            # A scale that is a tensor: the product is fp32 in one kernel.
            found += [wide[place.ranks], (up[place.outputs, place.ranks] * scale).to(self.factors[0].dtype)]
        return found


class Adapters:
    """Of all fused layers of a model."""

    def __init__(self) -> None:
        self._stacked: list[Stacked] = []
        self._made_of: tuple[object, ...] | None = None
        self._dtype: torch.dtype | None = None
        self._downs: list[torch.Tensor] = []
        self._ups: list[torch.Tensor] = []

    def add(self, stacked: Stacked) -> Stacked:
        self._stacked.append(stacked)
        return stacked

    def changed(self) -> None:
        """Some optimizers write where torch doesn't count it."""
        self._made_of = None

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Make them again if any weight has changed since. To be called before a forward pass."""
        state = (dtype, *(factor._version for stacked in self._stacked for factor in stacked.factors))
        if self._stacked and state != self._made_of:
            if dtype != self._dtype:
                self._lay_out(dtype)
            # Of all layers at once: one by one they are hundreds of kernels, at a moment when the GPU has nothing else to do.
            torch._foreach_copy_(self._downs, [factor for stacked in self._stacked for factor in stacked.factors[0::2]])
            torch._foreach_copy_(self._ups, [factor for stacked in self._stacked for factor in stacked.factors[1::2]])
            torch._foreach_mul_(self._ups, [place.scale for stacked in self._stacked for place in stacked.places])
            self._made_of = state

    def _lay_out(self, dtype: torch.dtype) -> None:
        places = [stacked.lay_out(dtype) for stacked in self._stacked]
        self._downs = [down for downs, _ in places for down in downs]
        self._ups = [up for _, ups in places for up in ups]
        self._dtype = dtype
