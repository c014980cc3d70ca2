"""How pairs are trained and examined: by whole steps, since the loss of a step is no sum over its pairs.

A step's pairs are encoded in chunks (`core.vision.gradcache`), its loss is taken over all of them at once, block by block
(`core.vision.chunked`): memory is that of a chunk, and the gradient that of the whole step, whatever its size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from core.data.pictures.normalise import Normalisation
from core.eval.rows import Example
from core.models.towers import image_features, text_features
from core.train.device import random_state, set_random_state
from core.train.pairs import PairBatch, PairChunks
from core.vision.chunked import chunked_info_nce
from core.vision.contrastive import PairIds, scale_of
from core.vision.geometry import alignment, kept_direction, retention, uniformity
from core.vision.gradcache import backward_in_chunks
from core.vision.retrieval import RECALL_AT, recall

_UNIFORMITY_ROWS = 2048
"""Of a step: all pairs of them are compared."""

Compute = Callable[[], AbstractContextManager[Any]]


class Features(NamedTuple):
    """Unit fp32 [B, D] each, and what the pairs are made of."""

    images: torch.Tensor
    texts: torch.Tensor
    ids: PairIds


@dataclass(frozen=True)
class Contrast:
    """What a run over pairs has beside its model."""

    normalisation: Normalisation
    log_scale: torch.Tensor
    """fp32, one number, on the device: the model's own parameter where the temperature learns."""
    base: Features | None
    """Of the held-out pairs, by the model as it was before training."""

    def backward(
        self, model: Any, batches: Sequence[PairBatch], *, compute: Compute, backward: Callable[[torch.Tensor], Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Add a step's gradient to the weights. Returns its loss in nats and its curves, fp64 scalars on the device."""
        device = self.log_scale.device
        ids = PairIds(torch.cat([batch.image_ids for batch in batches]), torch.cat([batch.text_ids for batch in batches]))

        def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
            return chunked_info_nce(images, texts, scale_of(self.log_scale), ids)

        step = backward_in_chunks(
            batches,
            partial(encode, model, normalisation=self.normalisation, compute=compute),
            loss,
            remember_chance=lambda: partial(set_random_state, random_state(device), device),
            backward=backward,
        )
        spread = torch.stack([uniformity(side[:_UNIFORMITY_ROWS]) for side in (step.images, step.texts)])
        curves = {
            "temperature": 1 / scale_of(self.log_scale.detach()).double(),
            "alignment": alignment(step.images, step.texts),
            "uniformity": spread.mean(),
        }
        return step.loss.double(), curves

    @torch.no_grad()
    def examine(self, model: Any, pairs: Sequence[Example], layout: PairChunks, *, compute: Compute) -> dict[str, float]:
        """Fields of an Evaluation over the held-out pairs. The model's mode is put back as it was found."""
        device = self.log_scale.device
        found = features(model, pairs, layout, device, normalisation=self.normalisation, compute=compute)
        loss = chunked_info_nce(found.images, found.texts, scale_of(self.log_scale), found.ids)
        recalls = recall_of(found)
        measured = {"eval_loss": float(loss)} | {f"eval_{name}": value for name, value in recalls.items()}
        if self.base is not None:
            kept = retention(recalls, recall_of(self.base))
            if kept:
                measured["eval_retention"] = fmean(kept.values())
            sides = ((found.images, self.base.images), (found.texts, self.base.texts))
            measured["eval_kept_direction"] = fmean(kept_direction(tuned, base) for tuned, base in sides)
        return measured


def encode(model: Any, batch: PairBatch, *, normalisation: Normalisation, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures', captions') unit fp32 features [B, D] of a chunk."""
    towers = model.get_base_model() if isinstance(model, PeftModel) else model
    pixels = _normalised(batch.pixels, normalisation)
    with compute():
        return image_features(towers, pixels), text_features(towers, batch.input_ids)


@torch.no_grad()
def features(
    model: Any,
    pairs: Sequence[Example],
    layout: PairChunks,
    device: torch.device,
    *,
    normalisation: Normalisation,
    compute: Compute,
) -> Features:
    """Of pairs in their order, in eval mode. The model's mode is put back as it was found."""
    was_training = model.training
    model.eval()
    images, texts, ids = [], [], []
    try:
        for part in layout.split(pairs):
            batch = layout.collate(part, device)
            found = encode(model, batch, normalisation=normalisation, compute=compute)
            images.append(found[0])
            texts.append(found[1])
            ids.append((batch.image_ids, batch.text_ids))
    finally:
        model.train(was_training)
    return Features(torch.cat(images), torch.cat(texts), PairIds(*(torch.cat(side) for side in zip(*ids, strict=True))))


def recall_of(found: Features) -> dict[str, float]:
    """Recall@K both ways, by the names of an Evaluation's fields less `eval_`. Pictures with several pairs count once."""
    pictures, owners = torch.unique(found.ids.images, return_inverse=True)
    first = torch.full((len(pictures),), len(owners), dtype=torch.int64, device=owners.device)
    first = first.scatter_reduce(0, owners, torch.arange(len(owners), device=owners.device), "amin")
    both = recall(found.images[first], found.texts, owners, found.ids.texts)
    return {
        **{f"image_to_text_recall_at_{k}": both.image_to_text[k] for k in RECALL_AT},
        **{f"text_to_image_recall_at_{k}": both.text_to_image[k] for k in RECALL_AT},
    }


def _normalised(pixels: torch.Tensor, normalisation: Normalisation) -> torch.Tensor:
    """fp32 [B, 3, H, W] of uint8 [B, H, W, 3]."""
    mean, deviation = (pixels.new_tensor(values, dtype=torch.float32) for values in (normalisation.mean, normalisation.deviation))
    return ((pixels.float() * normalisation.scale - mean) / deviation).permute(0, 3, 1, 2)
