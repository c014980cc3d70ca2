"""Adapters on a GPU: room for the ranks of many, and who has it now.

Memory is cut into pages of 16 ranks of every linear module of the base, each page in one piece: an adapter is copied in from
pinned host memory page by page, on a stream of its own, whatever its rank, and the step loop never waits for it. Who is asked
stays; of the others the one that was asked longest ago leaves when room is needed. What doesn't fit into pinned memory either
is read again from its folder (`host.py`). The engine's thread alone calls what is here, but for `staged`.

Weights are kept in the base's dtype, as it is multiplied: under a bf16 base an adapter that was trained in fp32 is rounded once
(2**-9 of each weight), and its sums are fp32 all the way.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from core.infer.gpu.host import Content, HostMemory, Staged
from core.infer.gpu.pool import RANKS, Pool, SiteShape
from core.infer.lora import LoraWeights, Residence, Site

Group = Sequence[tuple[str, Any]]
"""(path, linear module) of modules that read one input and are one matrix."""
_MOST_PAGES = 16
"""Of one adapter: rank 256."""
_MOST_SLOTS = 512
_ALIGNED = 64


@dataclass(eq=False)
class _Slot:
    number: int
    pages: list[int]
    arrived: Any = None
    """The event behind its copy; None where it is known to have passed."""


@dataclass
class Layout:
    """Where each module's weights lie in a page."""

    sites: list[SiteShape] = field(default_factory=list)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Path -> (number of its site, which part of it)."""
    elements: int = 0
    outputs: int = 0

    @classmethod
    def of(cls, groups: Iterable[Group]) -> "Layout":
        layout = cls()
        for number, group in enumerate(groups):
            inputs, outputs = group[0][1].in_features, tuple(module.out_features for _, module in group)
            down_at = layout.elements
            up_at = down_at + _aligned(len(group) * RANKS * inputs)
            layout.elements = up_at + _aligned(sum(outputs) * RANKS)
            layout.sites.append(SiteShape(number, inputs, outputs, down_at, up_at, layout.outputs))
            layout.outputs += _aligned(sum(outputs))
            layout.places |= {path: (number, part) for part, (path, _) in enumerate(group)}
        return layout


class DeviceSlots:
    def __init__(self, groups: Iterable[Group], device: torch.device, dtype: torch.dtype, *, gib: float, host_gib: float) -> None:
        """`gib` is the room for all adapters; at least one of rank 16 has some. `host_gib` is that in pinned memory."""
        self.layout = Layout.of(groups)
        self._device, self._dtype = device, dtype
        pages = min(_MOST_SLOTS, max(1, int(gib * 2**30) // (self.layout.elements * dtype.itemsize)))
        self._memory = torch.empty(pages, self.layout.elements, dtype=dtype, device=device)
        self._table = torch.zeros(pages, min(_MOST_PAGES, pages), dtype=torch.int32, device=device)
        self._counts = torch.zeros(pages, len(self.layout.sites), dtype=torch.int32, device=device)
        self._gains: torch.Tensor | None = None
        self._free_pages = list(range(pages))
        self._free_slots = list(range(pages))
        self._slots: OrderedDict[LoraWeights, _Slot] = OrderedDict()  # the longest unasked first
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.host = HostMemory(host_gib)

    @property
    def pool(self) -> Pool:
        """What kernels read. Its tensors stay the same, but for `gains`, which come with the first adapter that has any."""
        return Pool(self._memory, self._table, self._counts, self._gains)

    @property
    def resident(self) -> int:
        """Adapters on the GPU."""
        return len(self._slots)

    def staged(
        self, shapes: Mapping[str, int], sites: Iterable[tuple[str, Site]], again: Callable[[], Iterable[tuple[str, Site]]]
    ) -> Staged | None:
        """Any thread. None where the rank is more than a slot may have."""
        needed = -(-max(shapes.values()) // RANKS)
        if needed > self._table.shape[1]:
            return None
        staged = Staged(needed, self._content(needed, shapes, sites), lambda: self._content(needed, shapes, again()))
        self.host.keep(staged)
        return staged

    def _content(self, needed: int, shapes: Mapping[str, int], sites: Iterable[tuple[str, Site]]) -> Content:
        is_whole = len(shapes) == len(self.layout.places) and set(shapes.values()) == {needed * RANKS}
        make = torch.empty if is_whole else torch.zeros
        pages = make(needed, self.layout.elements, dtype=self._dtype, pin_memory=self._copying is not None)
        counts = torch.zeros(len(self.layout.sites), dtype=torch.int32)
        gains = None
        for path, site in sites:
            number, part = self.layout.places[path]
            shape = self.layout.sites[number]
            counts[number] = max(int(counts[number]), -(-len(site.down) // RANKS))
            begin = sum(shape.outputs[:part])
            end = begin + shape.outputs[part]
            for page, first in enumerate(range(0, len(site.down), RANKS)):
                down, up = site.down[first : first + RANKS], site.up[:, first : first + RANKS]
                downs = pages[page, shape.down_at : shape.down_at + len(shape.outputs) * RANKS * shape.inputs]
                ups = pages[page, shape.up_at : shape.up_at + sum(shape.outputs) * RANKS]
                downs.view(len(shape.outputs), RANKS, shape.inputs)[part, : len(down)].copy_(down)
                ups.view(-1, RANKS)[begin:end, : len(down)].copy_(up)
            if site.gain is not None:
                gains = torch.ones(self.layout.outputs) if gains is None else gains
                gains[shape.gains_at + begin : shape.gains_at + end] = site.gain.cpu()
        return Content(pages, self._pinned(counts), None if gains is None else self._pinned(gains))

    def ask(self, weights: LoraWeights) -> Residence:
        """Whether a step may use it; where it may not yet, it is on its way, or everyone that is here is held.

        One that can't be read again is said to be here: what then uses it is told why it can't."""
        slot = self._slots.get(weights)
        if slot is None:
            staged: Staged = weights.staged
            content = self.host.find(staged)
            if content is None:
                return "here" if staged.is_lost else "coming"
            if not self._make_room(staged.pages):
                return "no-room"
            slot = self._load(weights, content)
        self._slots.move_to_end(weights)
        if slot.arrived is not None and slot.arrived.query():
            slot.arrived = None
        return "here" if slot.arrived is None else "coming"

    def prefetch(self, weights: LoraWeights) -> None:
        """Begin to copy it where nobody has to leave for it."""
        if weights in self._slots or weights.staged.pages > len(self._free_pages):
            return
        content = self.host.find(weights.staged)
        if content is not None:
            self._load(weights, content)

    def number(self, weights: LoraWeights) -> int:
        """Its slot. What is launched from now on finds it there, though it may have to wait, on the GPU, for the copy.

        Raises RuntimeError where no room can be made, and what reading it again does."""
        if weights not in self._slots:
            content = self.host.wait(weights.staged)
            if not self._make_room(weights.staged.pages):
                raise RuntimeError("every adapter on the GPU is being asked, and there is no room for another")
            self._load(weights, content)
        self._slots.move_to_end(weights)
        slot = self._slots[weights]
        if slot.arrived is not None:
            torch.cuda.current_stream().wait_event(slot.arrived)
        return slot.number

    def hold(self, weights: LoraWeights) -> None:
        """A request that is being answered needs it."""
        staged: Staged = weights.staged
        if not staged.is_lost:
            self.number(weights)
        staged.holders += 1

    def let_go(self, weights: LoraWeights) -> None:
        staged: Staged = weights.staged
        staged.holders -= 1
        if not staged.holders and staged.is_lost:
            staged.reading = None  # whoever asks next has it tried again

    def forget(self, weights: LoraWeights) -> None:
        """It is served no longer, and nobody holds it."""
        if weights in self._slots:
            self._leave(weights)
        self.host.forget(weights.staged)

    def alone(self, weights: LoraWeights) -> Pool:
        """A pool with this adapter only, in slot 0, and nobody else's room taken."""
        content = self.host.wait(weights.staged)
        # As wide as the table of all: a kernel is compiled for its width.
        table = torch.zeros_like(self._table[:1])
        table[0, : len(content.pages)] = torch.arange(len(content.pages), dtype=torch.int32, device=self._device)
        gains = None if content.gains is None else content.gains.to(self._device)[None]
        return Pool(content.pages.to(self._device), table, content.counts.to(self._device)[None], gains)

    def _make_room(self, pages: int) -> bool:
        free, leaving = len(self._free_pages), []
        for weights, slot in self._slots.items():
            if free >= pages:
                break
            is_coming = slot.arrived is not None and not slot.arrived.query()
            if not weights.staged.holders and not is_coming:
                free += len(slot.pages)
                leaving.append(weights)
        if free < pages:
            return False
        for weights in leaving:
            self._leave(weights)
            weights.staged.evictions += 1
        return True

    def _leave(self, weights: LoraWeights) -> None:
        slot = self._slots.pop(weights)
        weights.staged.is_resident = False
        self._free_pages += slot.pages
        self._free_slots.append(slot.number)

    @torch.inference_mode()
    def _load(self, weights: LoraWeights, content: Content) -> _Slot:
        staged: Staged = weights.staged
        pages = [self._free_pages.pop() for _ in range(staged.pages)]
        slot = self._slots[weights] = _Slot(self._free_slots.pop(), pages)
        if content.gains is not None and self._gains is None:
            self._gains = torch.ones(len(self._table), self.layout.outputs, device=self._device)
        if self._copying is None:
            self._copy(slot, content)
        else:
            # Steps that are under way may still read what lay there.
            self._copying.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copying):
                self._copy(slot, content)
                slot.arrived = self._copying.record_event()
        staged.is_resident = True
        staged.loads += 1
        return slot

    def _copy(self, slot: _Slot, content: Content) -> None:
        for page, ranks in zip(slot.pages, content.pages, strict=True):
            self._memory[page].copy_(ranks, non_blocking=True)
        row = self._pinned(torch.tensor(slot.pages + [0] * (self._table.shape[1] - len(slot.pages)), dtype=torch.int32))
        self._table[slot.number].copy_(row, non_blocking=True)
        self._counts[slot.number].copy_(content.counts, non_blocking=True)
        if content.gains is not None and self._gains is not None:
            self._gains[slot.number].copy_(content.gains, non_blocking=True)
        elif self._gains is not None:
            self._gains[slot.number].fill_(1)

    def _pinned(self, table: torch.Tensor) -> torch.Tensor:
        """From pageable memory a copy may wait for what is before it on its stream."""
        return table.pin_memory() if self._copying is not None else table


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNED) * _ALIGNED
