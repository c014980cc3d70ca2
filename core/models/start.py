"""LoRA that begins along the weight's own directions: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

Both papers start from A0, B0 made of the weight W and put W - s·B0·A0 in W's place, so that the model is still itself. Here W
stays as it is: it may be quantised, and an endpoint holds the one original for many adapters. The frozen pair is taken off in
the adapter's own branch, W + s·(B·A - B0·A0), which is W at the start and has the papers' gradients. Written down it is a
plain LoRA of twice the rank, [B, -B0]·[A; A0], that any loader puts on the original weights.

The frozen pair is a function of W and so is in no checkpoint: a resumed run computes it again.
"""

from typing import Any, Literal

import torch
from torch.nn import functional

from core.models.load import dequantized_weight

Init = Literal["pissa", "olora"]


class Down(torch.nn.Module):
    """[A; A0]: [..., inputs] -> [..., 2r]; A is trained, A0 is not."""

    origin: torch.Tensor

    def __init__(self, origin: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(origin.clone())
        self.register_buffer("origin", origin, persistent=False)

    def both(self) -> torch.Tensor:
        return torch.cat([self.weight, self.origin])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.both())


class Up(torch.nn.Module):
    """[B, -B0]: [..., 2r] -> [..., outputs]; B is trained, B0 is not.

    One product over both pairs: what they share cancels in its fp32 accumulator, not between two rounded results.
    """

    origin: torch.Tensor

    def __init__(self, origin: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(origin.clone())
        self.register_buffer("origin", origin, persistent=False)

    def both(self) -> torch.Tensor:
        return torch.cat([self.weight, -self.origin], dim=1)

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        return functional.linear(both, self.both())


def install_start(layer: Any, adapter: str, init: Init) -> None:
    """Let an adapter of one of peft's LoRA layers begin along its weight. The rank must not exceed the weight's sides."""
    weight = dequantized_weight(layer.get_base_layer()).double()
    rank = layer.r[adapter]
    if init == "pissa":
        down, up = principal_pair(weight, rank, layer.scaling[adapter])
    else:
        down, up = orthonormal_pair(weight, rank)
    layer.lora_A[adapter] = Down(down.float().contiguous())
    layer.lora_B[adapter] = Up(up.float().contiguous())


def principal_pair(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(A0 [r, inputs], B0 [outputs, r]): scale · B0·A0 is the closest matrix of that rank, its singular values shared evenly.

    By the eigenvectors of the smaller Gram matrix: for the largest directions in fp64 as exact as a full decomposition, at a
    fraction of its time.
    """
    outputs, inputs = weight.shape
    gram = weight @ weight.T if outputs <= inputs else weight.T @ weight
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    half = (squares[-rank:].flip(0).clamp(min=torch.finfo(weight.dtype).tiny).sqrt() / scale).sqrt()
    vectors = vectors[:, -rank:].flip(1)
    if outputs <= inputs:
        return (vectors.T @ weight) / (scale * half[:, None]), vectors * half
    return vectors.T * half[:, None], (weight @ vectors) / (scale * half)


def orthonormal_pair(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A0 [r, inputs], B0 [outputs, r]): the first `rank` rows of R and columns of Q in W = Q·R."""
    # The first columns of Q depend on the first columns of W alone.
    up, _ = torch.linalg.qr(weight[:, :rank])
    return up.T @ weight, up


def as_lora(down: Down, up: Up) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [2r, inputs], B [outputs, 2r]) of the plain LoRA with the same scale that computes the same."""
    return down.both().detach(), up.both().detach()
