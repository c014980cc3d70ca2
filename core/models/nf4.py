"""Several 4-bit linear layers as one matrix, NF4 or FP4 (QLoRA, arXiv 2305.14314), without a second copy of their codes.

Layers that read the same input are multiplied in one go when their weights lie in one piece. Each keeps its own statistics:
with double quantisation every layer has its own offset, and quantising the joined matrix anew would give other weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes
import torch


@dataclass(frozen=True, eq=False)
class Joined4bit:
    """The weights of layers with I inputs and O_1, O_2, .. outputs as one [O, I], O = O_1 + O_2 + .."""

    codes: torch.Tensor  # uint8 [O * I / 2, 1], two weights a byte
    scales: torch.Tensor  # one for each block of weights: fp32, or uint8 codes with double quantisation
    blocks: tuple[int, ...]  # of each layer
    blocksize: int
    kind: str  # nf4 or fp4
    shape: tuple[int, int]
    # Double quantisation, else empty:
    nested: tuple[torch.Tensor, ...] = ()  # fp32: one for each nested_blocksize scales, of all layers at once or a tensor a layer
    nested_blocksize: int = 0
    tables: tuple[torch.Tensor, ...] = ()  # fp32 [256] each, as many as `nested`
    offsets: tuple[torch.Tensor, ...] = ()  # fp32 [], of each layer

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I]: the layers' own dequantised weights one below the other, bit for bit. Made anew at every call."""
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            self.codes, self._block_scales(), self.blocksize, self.kind, self.shape, dtype
        )

    def _block_scales(self) -> torch.Tensor:
        if not self.nested:
            return self.scales
        parts = [self.scales] if len(self.nested) == 1 else self.scales.split(list(self.blocks))
        dequantized = [
            torch.ops.bitsandbytes.dequantize_blockwise.default(part, nested, table, self.nested_blocksize, torch.float32)
            for part, nested, table in zip(parts, self.nested, self.tables, strict=True)
        ]
        scales = dequantized[0] if len(dequantized) == 1 else torch.cat(dequantized)
        for part, offset in zip(scales.split(list(self.blocks)), self.offsets, strict=True):
            part += offset
        return scales


def is_4bit(layer: torch.nn.Module) -> bool:
    return isinstance(layer, bitsandbytes.nn.Linear4bit)


def why_not_joined(layers: Sequence[Any]) -> str | None:
    """What keeps Linear4bit layers from being one matrix; None where nothing does."""
    states = [layer.weight.quant_state for layer in layers]
    if any(state is None for state in states):
        return "a 4-bit weight is not quantised yet"
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        return "4-bit weights are repacked for inference on a CPU"
    if any(layer.weight.dtype != torch.uint8 for layer in layers):
        return "4-bit weights are stored in other units than bytes"
    ways = {(state.quant_type, state.blocksize, state.nested and state.state2.blocksize, state.shape[1]) for state in states}
    if len(ways) > 1:
        return "4-bit weights that read one input are quantised in different ways"
    if any(state.shape.numel() % state.blocksize for state in states):
        return f"a 4-bit weight is no whole number of blocks of {states[0].blocksize}"
    return None


def join_4bit(layers: Sequence[Any]) -> Joined4bit:
    """Lay codes and scales of bitsandbytes' Linear4bit layers end to end; the layers hold views of them from then on.

    No memory is taken beyond the copy while it is made. `part_4bit` undoes it. Raises ValueError where `why_not_joined` has a
    reason.
    """
    if reason := why_not_joined(layers):
        raise ValueError(reason)
    states = [layer.weight.quant_state for layer in layers]
    first = states[0]
    codes, code_parts = _end_to_end([layer.weight.data for layer in layers])
    scales, scale_parts = _end_to_end([state.absmax for state in states])
    for layer, code_part, scale_part in zip(layers, code_parts, scale_parts, strict=True):
        layer.weight.data = code_part
        layer.weight.quant_state.absmax = scale_part
    plain = Joined4bit(
        codes=codes,
        scales=scales,
        blocks=tuple(map(len, scale_parts)),
        blocksize=first.blocksize,
        kind=first.quant_type,
        shape=(sum(state.shape[0] for state in states), first.shape[1]),
    )
    return _with_nested(plain, states) if first.nested else plain


def part_4bit(layers: Sequence[Any]) -> None:
    """Give layers that were joined memory of their own again."""
    for layer in layers:
        state = layer.weight.quant_state
        layer.weight.data = layer.weight.data.clone()
        state.absmax = state.absmax.clone()
        if state.nested:
            state.state2.absmax = state.state2.absmax.clone()


def _with_nested(plain: Joined4bit, states: Sequence[Any]) -> Joined4bit:
    """Scales are dequantised in one go where each layer's end with a whole block of them, as in all but toy models."""
    first = states[0].state2
    nested, tables = tuple(state.state2.absmax for state in states), tuple(state.state2.code for state in states)
    whole = all(blocks % first.blocksize == 0 for blocks in plain.blocks[:-1])
    if whole and all(torch.equal(table, first.code) for table in tables):
        joined, parts = _end_to_end(nested)
        for state, part in zip(states, parts, strict=True):
            state.state2.absmax = part
        nested, tables = (joined,), (first.code,)
    offsets = tuple(state.offset for state in states)
    return replace(plain, nested=nested, nested_blocksize=first.blocksize, tables=tables, offsets=offsets)


def _end_to_end(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """(all in one piece, views of each)."""
    whole = torch.cat(list(parts))
    return whole, whole.split([len(part) for part in parts])
