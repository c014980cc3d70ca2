"""BLIP's three losses (arXiv 2201.12086) and their weighted sum over one model that shares its encoders.

    ITC  are the features of a picture and its caption nearer to each other than to the others'?    `contrastive.info_nce`
    ITM  shown both at once, do they belong together?                                               `matching_nats`
    LM   what does the caption say, word for word?                                                  `caption_nats`

transformers computes the last one only, without the label smoothing that BLIP was trained with, and returns None for the other
two. Left out of the original recipe: the momentum encoder and its queue, which make up for batches that are small (here larger
ones are had by `gradcache`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.nn.functional import cross_entropy

from core.vision.captions import IGNORED
from core.vision.contrastive import PairIds, info_nce, similarity

LABEL_SMOOTHING = 0.1
"""BLIP's own. The configuration in transformers says 0 unless told."""

Batch = TypeVar("Batch", contravariant=True)


def caption_nats(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = LABEL_SMOOTHING
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed nats fp32 [B], trained tokens int64 [B]) of logits [B, T, V] and labels [B, T], as `collate_captions` makes them.

    Place t predicts the token at t + 1. With smoothing e a token's loss is (1 - e) times its own nats and e times the mean nats
    of the vocabulary; 0 measures held-out captions.
    """
    wanted = labels[:, 1:]
    scores = logits[:, :-1].flatten(0, 1).float()
    nats = cross_entropy(scores, wanted.flatten(), ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)
    return nats.view(wanted.shape).sum(1), (wanted != IGNORED).sum(1)


def matching_nats(scores: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """fp32 [N]: cross-entropy of the matching head's scores [N, 2]; `match`, int64 [N], is 1 for a true pair."""
    return cross_entropy(scores.float(), match, reduction="none")


class MatchingPairs(NamedTuple):
    """N pairs to be told true from false, by their rows in the batch: first the B true ones."""

    images: torch.Tensor  # int64 [N]
    texts: torch.Tensor  # int64 [N]
    match: torch.Tensor  # int64 [N], 1 or 0


def draw_matching_pairs(logits: torch.Tensor, ids: PairIds, generator: torch.Generator) -> MatchingPairs:
    """The B true pairs; for each caption a wrong picture; for each picture a wrong caption. So N ≤ 3 B.

    Wrong ones are drawn with the softmax of `logits` (similarity × scale, [B, B], pictures down) as their chances: the likelier
    a mistake, the oftener it is asked about. Never a pair that shares its picture or its caption; a row without any wrong
    partner gets none.
    """
    pairs = len(logits)
    rows = torch.arange(pairs, device=logits.device)
    every = slice(None)
    wrong = ~ids.shared(every, every)
    chances = logits.detach().float().masked_fill(~wrong, -torch.inf)
    # The largest of log-chance + Gumbel noise is a draw by those chances, exact however small they are.
    for_texts = (chances + _gumbel(chances, generator)).argmax(0)
    for_images = (chances + _gumbel(chances, generator)).argmax(1)
    asked_texts, asked_images = rows[wrong.any(0)], rows[wrong.any(1)]
    return MatchingPairs(
        images=torch.cat([rows, for_texts[asked_texts], asked_images]),
        texts=torch.cat([rows, asked_texts, for_images[asked_images]]),
        match=torch.cat([torch.ones_like(rows), torch.zeros_like(asked_texts), torch.zeros_like(asked_images)]),
    )


@dataclass(frozen=True)
class JointWeights:
    """What each loss counts in the sum; one of weight 0 is not computed. Raises ValueError for weights that train nothing."""

    itc: float = 1.0
    itm: float = 1.0
    lm: float = 1.0

    def __post_init__(self) -> None:
        if min(self.itc, self.itm, self.lm) < 0 or not any((self.itc, self.itm, self.lm)):
            raise ValueError(f"weights {self.itc:g}, {self.itm:g}, {self.lm:g} of ITC, ITM and LM: none below 0, one above")


class Encoded(NamedTuple):
    states: torch.Tensor  # [B, P, H]: the picture's patches, which the texts look at
    images: torch.Tensor  # unit [B, D]
    texts: torch.Tensor  # unit [B, D]


class SharedEncoders(Protocol[Batch]):
    """A model with BLIP's three faces; its picture encoder runs once a batch."""

    def encode(self, batch: Batch) -> Encoded: ...

    def match(self, batch: Batch, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """[N, 2]: scores of states [N, P, H], each with the batch's caption of that row, int64 [N]."""

    def describe(self, batch: Batch, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, T, V], labels [B, T]) of the captions, each token given those before it and the picture."""


class JointLoss(NamedTuple):
    """fp32 scalars; `total` alone has a gradient. What was not computed is None."""

    total: torch.Tensor
    itc: torch.Tensor | None  # nats, mean over pairs and both ways
    itm: torch.Tensor | None  # nats, mean over pairs asked about
    lm: torch.Tensor | None  # nats per trained token
    matching_accuracy: torch.Tensor | None  # 0 .. 1, of the pairs asked about


def joint_loss(
    model: SharedEncoders[Any],
    batch: Any,
    ids: PairIds,
    *,
    scale: torch.Tensor,
    weights: JointWeights,
    generator: torch.Generator,
    label_smoothing: float = LABEL_SMOOTHING,
) -> JointLoss:
    """ITC + ITM + LM, weighted, of a batch of B pairs. `scale` is 1 / temperature (`contrastive.scale_of`).

    `generator` draws the wrong pairs of ITM. A mean over the batch, which no sum over windows equals: one batch is one step.
    """
    encoded = model.encode(batch)
    total = torch.zeros((), device=encoded.states.device)
    itc = itm = lm = accuracy = None
    if weights.itc:
        itc = info_nce(encoded.images, encoded.texts, scale, ids)
        total = total + weights.itc * itc
    if weights.itm:
        logits = similarity(encoded.images.detach(), encoded.texts.detach()) * scale.detach()
        pairs = draw_matching_pairs(logits, ids, generator)
        scores = model.match(batch, encoded.states[pairs.images], pairs.texts)
        itm = matching_nats(scores, pairs.match).mean()
        accuracy = (scores.detach().argmax(1) == pairs.match).float().mean()
        total = total + weights.itm * itm
    if weights.lm:
        sums, counts = caption_nats(*model.describe(batch, encoded.states), label_smoothing)
        lm = sums.sum() / counts.sum()
        total = total + weights.lm * lm
    itc, itm, lm = (None if part is None else part.detach() for part in (itc, itm, lm))
    return JointLoss(total, itc, itm, lm, accuracy)


def _gumbel(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.empty(like.shape, device=generator.device).exponential_(generator=generator)
    return -drawn.clamp_(min=torch.finfo(torch.float32).tiny).log_().to(like.device)
