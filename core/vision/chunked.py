"""The losses of `core.vision.contrastive` without their matrix of similarities: equal in value and gradient, in linear memory.

Forward goes over the matrix block by block and keeps, of each block, only its share of the log-sum-exp of its rows and of its
columns, fp32 [B] each. Backward makes each block again, turns it into the gradient of its similarities, and multiplies that
into the gradients of the features at once. So a batch of B pairs of width D needs 8·B·D bytes of fp32 gradients and a few
blocks (block² × 4 bytes each) beside its features, where the plain formula needs several times 4·B². Tiled losses of this kind
are Inf-CL's (arXiv 2410.17243) and, for the sigmoid, SigLIP's own chunks (arXiv 2303.15343, 3.3).

Products take fp32 features (TF32 where the process allows that), sums are always fp32. With `products=torch.bfloat16` the
operands are rounded to bf16 before each product, still summed in fp32: several times faster on tensor cores, logits wrong by
about 1e-3 × scale.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from core.vision.contrastive import PairIds, check_features, no_autocast

BLOCK = 4096
"""Rows and columns of a block: 64 MiB in fp32, of which three or four are alive at once."""


def chunked_info_nce(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    ids: PairIds | None = None,
    *,
    block: int = BLOCK,
    products: torch.dtype = torch.float32,
) -> torch.Tensor:
    """fp32 scalar: `info_nce`, with gradients to both features [B, D] and to the scale."""
    check_features(images, texts, ids)
    loss: torch.Tensor = _InfoNce.apply(images, texts, scale, ids, block, products)
    return loss


def chunked_siglip(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    ids: PairIds | None = None,
    *,
    block: int = BLOCK,
    products: torch.dtype = torch.float32,
) -> torch.Tensor:
    """fp32 scalar: `siglip`, with gradients to both features [B, D], to the scale and to the bias."""
    check_features(images, texts, ids)
    loss: torch.Tensor = _Siglip.apply(images, texts, scale, bias, ids, block, products)
    return loss


class _InfoNce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        ids: PairIds | None,
        block: int,
        products: torch.dtype,
    ) -> torch.Tensor:
        matrix = _Matrix(images, texts, scale, ids, block, products)
        rows = images.new_full((len(images),), -math.inf, dtype=torch.float32)
        columns, own = rows.clone(), torch.empty_like(rows)
        for i, j, logits in matrix.blocks():
            rows[i] = torch.logaddexp(rows[i], logits.logsumexp(1))
            columns[j] = torch.logaddexp(columns[j], logits.logsumexp(0))
            if i == j:
                own[i] = logits.diagonal()
        ctx.save_for_backward(images, texts, scale, rows, columns)
        ctx.ids, ctx.block, ctx.products = ids, block, products
        # Summed in fp64: 65,536 fp32 terms one after the other would cost the last digits.
        return ((rows.double() + columns.double() - 2 * own.double()).mean() / 2).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        images, texts, scale, rows, columns = ctx.saved_tensors
        matrix = _Matrix(images, texts, scale, ctx.ids, ctx.block, ctx.products)
        for i, j, logits in matrix.blocks():
            towards = (logits - rows[i, None]).exp_()
            towards += logits.sub_(columns[None, j]).exp_()
            if i == j:
                towards.diagonal().sub_(2)
            matrix.collect(i, j, towards)
        return (*matrix.gradients(grads[0] / (2 * len(images))), None, None, None)


class _Siglip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        ids: PairIds | None,
        block: int,
        products: torch.dtype,
    ) -> torch.Tensor:
        matrix = _Matrix(images, texts, scale, ids, block, products)
        total = images.new_zeros((), dtype=torch.float64)
        for i, j, logits in matrix.blocks():
            logits += bias  # minus infinity stays: a pair left out is a negative that costs nothing
            if i == j:
                logits.diagonal().neg_()
            total -= logsigmoid(logits.neg_()).sum(dtype=torch.float64)
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.ids, ctx.block, ctx.products = ids, block, products
        return (total / len(images)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        images, texts, scale, bias = ctx.saved_tensors
        matrix = _Matrix(images, texts, scale, ctx.ids, ctx.block, ctx.products)
        towards_bias = images.new_zeros((), dtype=torch.float64)
        for i, j, logits in matrix.blocks():
            towards = logits.add_(bias).sigmoid_()
            if i == j:
                towards.diagonal().sub_(1)
            towards_bias += towards.sum(dtype=torch.float64)
            matrix.collect(i, j, towards)
        share = grads[0] / len(images)
        return (*matrix.gradients(share), (towards_bias * share).to(bias.dtype).reshape(bias.shape), None, None, None)


class _Matrix:
    """The logits of B × B pairs, one block at a time, and the gradients that their gradient has for what they are made of."""

    def __init__(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        ids: PairIds | None,
        block: int,
        products: torch.dtype,
    ) -> None:
        self.images, self.texts, self.scale, self.ids, self.products = images, texts, scale, ids, products
        self.spans = [slice(start, min(start + block, len(images))) for start in range(0, len(images), block)]
        self.towards_images: torch.Tensor | None = None
        self.towards_texts: torch.Tensor | None = None

    def blocks(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, logits fp32 [rows, columns], the reader's to change); minus infinity where pairs are no negatives."""
        for i in self.spans:
            ours = self.images[i].to(self.products)
            for j in self.spans:
                logits = self._product(ours, self.texts[j].to(self.products).T).mul_(self.scale)
                if self.ids is not None:
                    shared = self.ids.shared(i, j)
                    if i == j:
                        shared.fill_diagonal_(False)
                    logits.masked_fill_(shared, -math.inf)
                yield i, j, logits

    def collect(self, i: slice, j: slice, towards: torch.Tensor) -> None:
        """Take the gradient of a block's logits, but for a factor common to all of them."""
        if self.towards_images is None or self.towards_texts is None:
            self.towards_images = torch.zeros_like(self.images, dtype=torch.float32)
            self.towards_texts = torch.zeros_like(self.texts, dtype=torch.float32)
        towards = towards.to(self.products)
        self.towards_images[i] += self._product(towards, self.texts[j].to(self.products))
        self.towards_texts[j] += self._product(towards.T, self.images[i].to(self.products))

    def gradients(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For images, texts and scale, in their own dtypes; the sums are used up."""
        assert self.towards_images is not None
        assert self.towards_texts is not None
        # Σ gradient × similarity over the matrix is Σ picture · (gradient × texts): no third pass over the blocks.
        towards_scale = sum((self.towards_images[i].double() * self.images[i].double()).sum() for i in self.spans) * factor
        both = self.scale * factor
        return (
            self.towards_images.mul_(both).to(self.images.dtype),
            self.towards_texts.mul_(both).to(self.texts.dtype),
            towards_scale.to(self.scale.dtype).reshape(self.scale.shape),
        )

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """fp32 [m, n] of operands in `products`, summed in fp32."""
        with no_autocast(left):
            if left.dtype == torch.float32:
                return left @ right
            if left.device.type == "cuda":
                return torch.mm(left, right, out_dtype=torch.float32)
            return left.float() @ right.float()  # elsewhere a product's dtype is its operands'
