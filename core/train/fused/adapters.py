"""LoRA's matrices of all fused layers: the few pieces of memory they train in, and as layers multiply with them.

Projections of the same shape, one of each layer, lie in one piece, and so do their gradients: what is done to each of 300
matrices in every step is then done to eight. A and B of a module stay peft's own parameters, as views. Layers multiply with
copies in the compute dtype, A one below the other, B scaled and on a diagonal, made once for each state of the weights. L is
layers, M a projection's adapted modules, r their rank and R = M r.
"""

import contextlib
from collections.abc import Iterator, Sequence
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
    """The LoRA of one projection."""

    places: tuple[Place, ...]
    factors: tuple[torch.nn.Parameter, ...]
    """A and B of each module in turn: what trains."""
    outputs: int
    of_below: torch.Tensor | None = None
    of_above: tuple[torch.Tensor, ...] = ()
    """Where the gradients of all A lie, as one matrix, and of each B."""
    down: torch.Tensor | None = None
    """All A one below the other [R, inputs]."""
    up: torch.Tensor | None = None
    """All B, scaled, on a diagonal [outputs, R]."""

    def alike(self) -> tuple[object, ...]:
        """Equal for projections that can lie in one piece."""
        places = [(place.outputs.start, place.outputs.stop, place.ranks.start, place.scale) for place in self.places]
        return (*places, self.factors[0].shape, self.outputs, self.factors[0].dtype)

    def add(self, of_down: torch.Tensor, of_up: torch.Tensor) -> None:
        """Add the gradients of `down` and `up` to the factors'. Of B that stand on a diagonal nothing else counts."""
        assert self.of_below is not None
        self.of_below.add_(of_down)
        for place, own in zip(self.places, self.of_above, strict=True):
            own.add_(of_up[place.outputs, place.ranks], alpha=place.scale)


class _Group:
    """Projections of one shape."""

    def __init__(self, members: Sequence[Stacked]) -> None:
        self.members, first = members, members[0]
        (rank, inputs), count, modules = first.factors[0].shape, len(members), len(first.places)
        self._split = (count, first.outputs, modules, rank)
        like = first.factors[0].detach()
        self._below, self._above = like.new_empty(count, modules * rank, inputs), like.new_zeros(count, first.outputs, rank)
        self._of_below, self._of_above = torch.zeros_like(self._below), torch.zeros_like(self._above)
        self._scales = like.new_zeros(first.outputs, modules, 1, dtype=torch.float32)
        for number, place in enumerate(first.places):
            self._scales[place.outputs, number] = place.scale
        self.gradients: list[torch.Tensor] = []
        """Of the members' factors, in their order."""
        for layer, member in enumerate(members):
            for number, place in enumerate(member.places):
                at = (self._below[layer, place.ranks], self._above[layer, place.outputs])
                for factor, view in zip(member.factors[2 * number : 2 * number + 2], at, strict=True):
                    factor.data = view.copy_(factor.data)
                self.gradients += [self._of_below[layer, place.ranks], self._of_above[layer, place.outputs]]
            member.of_below = self._of_below[layer]
            member.of_above = tuple(self._of_above[layer, place.outputs] for place in member.places)
        self._down = self._up = like.new_empty(0)

    def make(self, dtype: torch.dtype) -> None:
        if self._down.dtype != dtype or not len(self._down):
            self._down = torch.empty_like(self._below, dtype=dtype)
            self._up = self._above.new_empty(*self._split, dtype=dtype).flatten(2)
            for layer, member in enumerate(self.members):
                member.down, member.up = self._down[layer], self._up[layer]
        self._down.copy_(self._below)
        torch.mul(self._above.unsqueeze(2), self._scales, out=self._up.view(self._split))

    def zero_gradients(self) -> None:
        self._of_below.zero_()
        self._of_above.zero_()


class Adapters:
    """Of all fused layers of a model. Between `join` and `part` the factors lie in memory of theirs."""

    def __init__(self) -> None:
        self._stacked: list[Stacked] = []
        self._groups: list[_Group] = []
        self._made_of: tuple[object, ...] | None = None
        self.gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
        """Of each factor: where it lies from `lay_gradients` on."""

    def add(self, stacked: Stacked) -> Stacked:
        self._stacked.append(stacked)
        return stacked

    def join(self) -> None:
        """To be called when all are added."""
        alike: dict[tuple[object, ...], list[Stacked]] = {}
        for stacked in self._stacked:
            alike.setdefault(stacked.alike(), []).append(stacked)
        self._groups = [_Group(members) for members in alike.values()]
        self.gradients = {}
        for group in self._groups:
            factors = (factor for member in group.members for factor in member.factors)
            self.gradients.update(zip(factors, group.gradients, strict=True))

    def part(self) -> None:
        """Give the factors memory of their own again."""
        for factor in self.gradients:
            factor.data = factor.data.clone()
            factor.grad = None

    def changed(self) -> None:
        """Some optimizers write where torch doesn't count it."""
        self._made_of = None

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Make what layers multiply with again if any weight has changed since. To be called before a forward pass."""
        state = (dtype, *(factor._version for factor in self.gradients))
        if state != self._made_of:
            for group in self._groups:
                group.make(dtype)
            self._made_of = state

    def lay_gradients(self) -> None:
        """The factors' gradients lie in memory of theirs from now on: as they were, zero where there were none. To be called
        before a forward pass whose way back adds to them."""
        if all(factor.grad is None for factor in self.gradients):
            for group in self._groups:
                group.zero_gradients()
            for factor, own in self.gradients.items():
                factor.grad = own
        for factor, own in self.gradients.items():
            if factor.grad is not own:
                own.zero_() if factor.grad is None else own.copy_(factor.grad)
                factor.grad = own

    @contextlib.contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """What is added up inside is forgotten."""
        kept = [own.clone() for own in self.gradients.values()]
        try:
            yield
        finally:
            for own, before in zip(self.gradients.values(), kept, strict=True):
                own.copy_(before)
