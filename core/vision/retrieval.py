"""Recall@K both ways: among how many pictures, or captions, a right one is found in the first K places.

A picture may have several captions, and a caption several pictures: a picture's search is a hit when any of its captions is in
the first K, and the other way round (the protocol of Karpathy and Fei-Fei 2015 on COCO). Equal texts count as one caption, so a
picture that is found by a caption word for word its own is not a miss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """Shares 0 .. 1, by K."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


@torch.no_grad()
def recall(
    images: torch.Tensor,
    texts: torch.Tensor,
    owners: torch.Tensor,
    text_ids: torch.Tensor | None = None,
    *,
    at: Sequence[int] = RECALL_AT,
    block: int = 1024,
) -> Recall:
    """Of unit features [I, D] and [T, D]; caption t belongs to picture `owners[t]` (int64 [T]).

    `text_ids`, int64 [T], are equal where texts are; without them all count as different. A wrong candidate that is as near as
    the right one stands before it, so that a model whose features have all become one scores nothing. Raises ValueError
    where a picture has no caption.
    """
    if not len(images) or len(texts) != len(owners):
        raise ValueError(f"{len(images)} pictures, {len(texts)} captions and {len(owners)} owners can't be searched")
    owned = torch.bincount(owners, minlength=len(images))
    if len(owned) != len(images) or not bool(owned.all()):
        raise ValueError(f"owners must name each of the {len(images)} pictures at least once and no other")
    names = torch.arange(len(texts), device=texts.device) if text_ids is None else torch.unique(text_ids, return_inverse=True)[1]
    captions = int(names.max()) + 1

    def searched() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(similarities fp32, bool "right") [block, T], block by block of the pictures."""
        for start in range(0, len(images), block):
            rows = images[start : start + block]
            owned = (owners >= start) & (owners < start + len(rows))
            right = torch.zeros(len(rows), captions, dtype=torch.bool, device=images.device)
            right[owners[owned] - start, names[owned]] = True
            yield rows.float() @ texts.float().T, right[:, names]

    best = torch.full((len(texts),), -torch.inf, device=images.device)
    for near, right in searched():
        best = torch.maximum(best, near.masked_fill(~right, -torch.inf).amax(0))
    ahead_of_images = torch.zeros(len(texts), dtype=torch.int64, device=images.device)
    ahead_of_texts = []
    for near, right in searched():
        own = near.masked_fill(~right, -torch.inf).amax(1)
        ahead_of_texts.append(((near >= own[:, None]) & ~right).sum(1))
        ahead_of_images += ((near >= best) & ~right).sum(0)
    places = torch.cat(ahead_of_texts)
    return Recall({k: _share(places < k) for k in at}, {k: _share(ahead_of_images < k) for k in at})


def _share(hits: torch.Tensor) -> float:
    return float(hits.float().mean())
