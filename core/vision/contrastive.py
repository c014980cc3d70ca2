"""Contrastive losses of paired pictures and texts, in their plain formula, and the temperature they share.

Features are unit vectors (`torch.nn.functional.normalize`); losses are fp32 whatever autocast is on, since a scale of 100 makes
a bf16 similarity wrong by a quarter of a nat. `core.vision.chunked` computes the same without the matrix of similarities.

Pairs that share a picture or a caption (`PairIds`) are not each other's negatives: both sides of such a pair were seen
together, so "wrong" would be a false label. They are left out of the denominators, not added as further positives:

- the pair across (picture i, caption j) *is* another row's pair, whose own term already asks for it. As a second positive a
  caption used m times would be asked for m² times, and a run would learn how often a caption stands in the file;
- a softmax with several targets is content only when all are equally likely. It pulls down the better of two true pictures,
  and where every row is alike, and nothing can be learned, it still has a loss of log B;
- leaving them out is what sampled softmax does with samples that hit the target (Jean et al. 2015): the loss of a row is what
  it would be in a batch that held its picture and caption once.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

START_TEMPERATURE = 0.07
MAX_LOG_SCALE = math.log(100)
"""CLIP's bound (arXiv 2103.00020, 2.5): past it one step may overflow what it is multiplied by."""


def log_scale_of(temperature: float) -> float:
    """What the parameter `logit_scale` holds for a temperature. Raises ValueError below 0.01, which it can't hold."""
    if not math.isfinite(temperature) or temperature < 0.01:
        raise ValueError(f"a temperature of {temperature:g} is not offered: 0.01 or more, since the scale is held at 100 or less")
    return min(-math.log(temperature), MAX_LOG_SCALE)


def scale_of(log_scale: torch.Tensor) -> torch.Tensor:
    """fp32 scalar, 1 / temperature, with a gradient to the parameter where that learns."""
    # The parameter of CLIPModel has no dimension; other towers keep one of a single number.
    return log_scale.float().clamp(max=MAX_LOG_SCALE).exp().reshape(())


@torch.no_grad()
def hold_log_scale(log_scale: torch.Tensor) -> None:
    """To be called after each optimizer step: a parameter past the bound would have no gradient to come back by."""
    log_scale.clamp_(max=MAX_LOG_SCALE)


@dataclass(frozen=True)
class PairIds:
    """Which picture and which caption each of B pairs is made of; equal numbers, equal content."""

    images: torch.Tensor  # int64 [B]
    texts: torch.Tensor  # int64 [B]

    @classmethod
    def distinct(cls, pairs: int, device: torch.device | None = None) -> "PairIds":
        numbers = torch.arange(pairs, device=device)
        return cls(numbers, numbers)

    def shared(self, rows: slice, columns: slice) -> torch.Tensor:
        """bool [rows, columns]: the two pairs share a picture or a caption. True where a pair meets itself."""
        images = self.images[rows, None] == self.images[None, columns]
        return images | (self.texts[rows, None] == self.texts[None, columns])


def info_nce(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, ids: PairIds | None = None) -> torch.Tensor:
    """fp32 scalar: symmetric InfoNCE in nats, mean over B pairs and both ways (arXiv 2103.00020, figure 3).

    `images` and `texts` are [B, D]; row i of both is a pair. Without ids all pairs count as distinct.
    """
    check_features(images, texts, ids)
    logits = similarity(images, texts) * scale
    if ids is not None:
        every = slice(None)
        logits = logits.masked_fill(ids.shared(every, every) & ~_diagonal(logits), -math.inf)
    own = logits.diagonal()
    return (logits.logsumexp(1) - own + logits.logsumexp(0) - own).mean() / 2


def chosen_info_nce(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """fp32 scalar: symmetric InfoNCE of each pair against its own chosen negatives alone.

    `negatives`, int64 [B, K], are rows of the features [M, D], M ≥ B; the first B rows are the pairs, what follows are
    companions that serve as negatives only. -1 stands for none: a pair without any has no loss. See `core.vision.negatives`.
    """
    check_features(images, texts)
    if negatives.ndim != 2 or len(negatives) > len(images):
        raise ValueError(
            f"negatives of shape {tuple(negatives.shape)} for {len(images)} rows of features: [B, K], B rows or fewer"
        )
    pairs = len(negatives)
    with no_autocast(images):
        images, texts = images.float(), texts.float()
        own = (images[:pairs] * texts[:pairs]).sum(1) * scale
        losses = torch.zeros_like(own)
        for ours, others in ((images, texts), (texts, images)):
            wrong = torch.einsum("bd,bkd->bk", ours[:pairs], others[negatives.clamp(min=0)]) * scale
            logits = torch.cat([own[:, None], wrong.masked_fill(negatives < 0, -math.inf)], 1)
            losses = losses + logits.logsumexp(1) - own
    return losses.mean() / 2


def siglip(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, ids: PairIds | None = None
) -> torch.Tensor:
    """fp32 scalar: the sigmoid loss (arXiv 2303.15343, algorithm 1): nats summed over B × B, divided by B.

    `bias` is a scalar that learns, -10 at first, as `scale` begins at 10 (temperature 0.1).
    """
    check_features(images, texts, ids)
    logits = similarity(images, texts) * scale + bias
    diagonal = _diagonal(logits)
    nats = -logsigmoid(torch.where(diagonal, logits, -logits))
    if ids is not None:
        every = slice(None)
        nats = nats.masked_fill(ids.shared(every, every) & ~diagonal, 0.0)
    return nats.sum() / len(images)


def check_features(images: torch.Tensor, texts: torch.Tensor, ids: PairIds | None = None) -> None:
    """Raises ValueError for what is not B pairs of one width, or ids of another number."""
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise ValueError(f"features of shapes {tuple(images.shape)} and {tuple(texts.shape)} are not pairs: both must be [B, D]")
    if ids is not None and not len(ids.images) == len(ids.texts) == len(images):
        raise ValueError(f"{len(ids.images)} picture ids and {len(ids.texts)} caption ids for {len(images)} pairs")


def no_autocast(like: torch.Tensor) -> torch.autocast:
    """The context in which matrix products keep the precision of their operands."""
    return torch.autocast(like.device.type, enabled=False)


def similarity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """fp32 [B, B]: picture i and text j, under autocast too."""
    with no_autocast(images):
        return images.float() @ texts.float().T


def _diagonal(square: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)
