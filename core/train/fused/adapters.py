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

    def make(self, dtype: torch.dtype) -> None:
        below, above = self.factors[0::2], self.factors[1::2]
        if self.down is None or self.up is None or self.down.dtype != dtype:
            ranks, inputs = sum(len(factor) for factor in below), below[0].shape[1]
            self.down = below[0].new_empty(ranks, inputs, dtype=dtype)
            self.up = below[0].new_zeros(self.outputs, ranks, dtype=dtype)
            self.scales = [below[0].new_full((1,), place.scale, dtype=torch.float32) for place in self.places]
        torch._foreach_copy_([self.down[place.ranks] for place in self.places], below)
        for place, factor in zip(self.places, above, strict=True):
            self.up[place.outputs, place.ranks] = factor * place.scale

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
        if state != self._made_of:
            for stacked in self._stacked:
                stacked.make(dtype)
            self._made_of = state
