"""MoRA (arXiv 2405.12130) in its sharing form: one trained square matrix per linear module, of full rank.

With n = floor(sqrt((inputs + outputs) · rank)) the square has as many numbers as LoRA of that rank. Input j is added into
group j mod n, the square maps groups to groups, and output o reads group o mod n. It stands on peft's LoRA layers as their
lora_A (sum and square) and lora_B (spread) with a scale of 1, so that switching, checkpointing and saving work as for LoRA.
What is written down is the plain LoRA of rank n that it equals.
"""

from typing import Any

import torch
from torch.nn import functional

from core.tuning import mora_size


class SharedSquare(torch.nn.Module):
    """Sum the inputs into groups and multiply: [..., inputs] -> [..., n]. Zero at the start, so the model is its base."""

    def __init__(self, inputs: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = torch.nn.Parameter(torch.zeros(size, size, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = len(self.weight)
        if missing := -self.inputs % size:
            x = functional.pad(x, (0, missing))
        # Added up in fp32: a sum of dozens of bf16 inputs would lose more than the product does.
        return functional.linear(x.unflatten(-1, (-1, size)).sum(-2, dtype=self.weight.dtype), self.weight)


class Spread(torch.nn.Module):
    """Every output reads its group: [..., n] -> [..., outputs]. Nothing is trained here."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        copies = -(-self.outputs // groups.shape[-1])
        return torch.cat([groups] * copies, dim=-1)[..., : self.outputs]


def install_square(layer: Any, adapter: str, rank: int) -> None:
    """Turn an adapter of one of peft's LoRA layers into MoRA with as many numbers as LoRA of `rank`."""
    device = layer.get_base_layer().weight.device
    size = mora_size(layer.in_features, layer.out_features, rank)
    layer.lora_A[adapter] = SharedSquare(layer.in_features, size, device)
    layer.lora_B[adapter] = Spread(layer.out_features)


def as_lora(square: SharedSquare, spread: Spread) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [n, inputs], B [outputs, n]) of the LoRA with scale 1 that computes the same."""
    weight = square.weight.detach()
    size = len(weight)
    columns = torch.arange(square.inputs, device=weight.device) % size
    rows = torch.arange(spread.outputs, device=weight.device) % size
    return weight[:, columns], torch.eye(size, dtype=weight.dtype, device=weight.device)[rows]
