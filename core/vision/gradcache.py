"""The gradient of a contrastive loss over more pairs than fit in memory with their activations (GradCache, arXiv 2101.06983).

A contrastive loss is not a sum over pairs: two windows of 8 pairs are not one of 16, so gradients can't be accumulated as the
text objectives' are. But towards the weights the loss goes through the features alone. So: all chunks are encoded without a
graph, the loss and its gradient are taken on the features of the whole batch, and each chunk is encoded once more, with a
graph, to carry its features' gradient to the weights. One more forward pass, about a third more time; the batch is bounded by
its features (4·D bytes each), whatever the towers hold.

The second encoding must be the first one again, dropout included: chance is put back for each chunk. After the last one it
stands where it stood before the loss, so that a step draws from it as if there had been one pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

Chunk = TypeVar("Chunk")
Features = tuple[torch.Tensor, torch.Tensor]
"""Of pictures and texts, [b, D] each."""


class CachedStep(NamedTuple):
    loss: torch.Tensor  # fp32 scalar, detached
    images: torch.Tensor  # fp32 [B, D], detached: what the curves of a step are made of
    texts: torch.Tensor  # fp32 [B, D], detached


def backward_in_chunks(
    chunks: Sequence[Chunk],
    encode: Callable[[Chunk], Features],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    remember_chance: Callable[[], Callable[[], None]],
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
) -> CachedStep:
    """Add the gradient of `loss` over all chunks to the weights; equal to that of one pass over the whole batch.

    `encode` gives a chunk's features with its own autocast around it; `loss` takes the features of the batch, fp32, in order,
    and may have parameters of its own (the temperature). `remember_chance()` notes where the random generators stand and returns
    what puts them back. `backward` is called once, on the loss (accelerate's scales it for fp16; what it scales by reaches the
    weights through the features). Raises ValueError where nothing in the towers has a gradient.
    """
    if not chunks:
        raise ValueError("no chunk to train on")
    if len(chunks) == 1:
        images, texts = (features.float() for features in encode(chunks[0]))
        total = loss(images, texts)
        backward(total)
        return CachedStep(total.detach(), images.detach(), texts.detach())

    put_back: list[Callable[[], None]] = []
    encoded: list[Features] = []
    with torch.no_grad():
        for chunk in chunks:
            put_back.append(remember_chance())
            encoded.append(encode(chunk))
    after = remember_chance()
    # Inside an autocast of the caller's, weights cast without a graph would be taken for the second pass: no gradient, no word.
    torch.clear_autocast_cache()
    images, texts = (torch.cat([features[side].float() for features in encoded]).requires_grad_() for side in (0, 1))
    sizes = [len(features[0]) for features in encoded]
    del encoded
    total = loss(images, texts)
    backward(total)
    if images.grad is None or texts.grad is None:
        raise ValueError("the loss has no gradient for the features of both sides")

    gradients = zip(images.grad.split(sizes), texts.grad.split(sizes), strict=True)
    for chunk, put_chance_back, towards in zip(chunks, put_back, gradients, strict=True):
        put_chance_back()
        # A locked tower's features have no graph, and need none.
        carried = [(side, grad) for side, grad in zip(encode(chunk), towards, strict=True) if side.requires_grad]
        if not carried:
            raise ValueError("neither tower has anything to train: its features have no gradient")
        torch.autograd.backward([side for side, _ in carried], [grad.to(side.dtype) for side, grad in carried])
    after()
    return CachedStep(total.detach(), images.detach(), texts.detach())
