"""What checkpointed layers are made from again, in the host's memory while it is not needed.

Copies run beside the computation, on a stream of their own: out while the next layer computes, back one layer ahead. No copy is
waited for by the host. Every place has page-locked memory that is allocated once and used again by every micro-batch.
"""

import math
from dataclasses import dataclass

import torch

_IN_FLIGHT = 2
"""Tensors on their way out at most: a GPU that is faster than its bus waits for it instead of filling up."""
_ROOM = 1 << 20
"""Places grow in whole MiB."""


@dataclass(eq=False)
class _Place:
    """Of one tensor of every micro-batch."""

    memory: torch.Tensor | None = None  # uint8, in the host
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    is_sent: bool = False
    returned: torch.Tensor | None = None  # on its way back, or there
    is_back: "torch.cuda.Event | None" = None

    def view(self) -> torch.Tensor:
        """Its memory as the tensor that was sent."""
        assert self.memory is not None
        size = math.prod(self.shape) * self.dtype.itemsize
        return self.memory[:size].view(self.dtype).view(self.shape)


class HostStreams:
    """Places in the order in which a forward pass fills them; the backward pass asks for them in the reverse order.

    On a CPU, where host and device are one, the same with plain copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._places: list[_Place] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._device = device

    def new_place(self) -> int:
        self._places.append(_Place())
        return len(self._places) - 1

    def send(self, number: int, tensor: torch.Tensor) -> None:
        """Copy a contiguous tensor out. It is held until the copy is done, in the order of the GPU's own work."""
        place = self._places[number]
        size = tensor.numel() * tensor.element_size()
        if place.memory is None or len(place.memory) < size:
            room = -(-size // _ROOM) * _ROOM
            place.memory = torch.empty(room, dtype=torch.uint8, pin_memory=self._stream is not None)
        place.shape, place.dtype, place.is_sent = tuple(tensor.shape), tensor.dtype, True
        place.returned = place.is_back = None  # of a pass that was given up
        if self._stream is None:
            place.view().copy_(tensor)
            return
        self._let_go(_IN_FLIGHT - 1)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            place.view().copy_(tensor, non_blocking=True)
            self._leaving.append((tensor, self._stream.record_event()))

    def fetch(self, number: int) -> torch.Tensor:
        """What was sent to this place; the one before it sets out on its way back. Once for every `send`."""
        self._let_go(0)
        place = self._places[number]
        if place.returned is None:
            self._bring_back(place)
        found, is_back = place.returned, place.is_back
        assert found is not None
        place.returned = place.is_back = None
        place.is_sent = False
        if is_back is not None:
            torch.cuda.current_stream(self._device).wait_event(is_back)
        before = next((other for other in reversed(self._places[:number]) if other.is_sent), None)
        if before is not None and before.returned is None and self._stream is not None:
            self._bring_back(before)
        return found

    def _let_go(self, most: int) -> None:
        # The current stream waits, so memory that is freed here is used again only after the copy: no record_stream, which
        # would hold it back until the host looks.
        while len(self._leaving) > most:
            tensor, is_out = self._leaving.pop(0)
            torch.cuda.current_stream(self._device).wait_event(is_out)
            del tensor

    def _bring_back(self, place: _Place) -> None:
        place.returned = torch.empty(place.shape, dtype=place.dtype, device=self._device)
        if self._stream is None:
            place.returned.copy_(place.view())
            return
        # Its memory may still be read by what was asked of the GPU before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            place.returned.copy_(place.view(), non_blocking=True)
            place.is_back = self._stream.record_event()
