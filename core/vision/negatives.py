"""Which pairs a pair is told apart from, where that is not simply every other pair of its batch.

Each chooser gives rows of the set it was asked about, int64, never one that shares a picture or a caption with the pair itself;
-1 where there is none. How a step uses them:

    in_batch   nothing to choose: `info_nce` over the batch
    shuffle    one other pair of the same batch: `chosen_info_nce`
    random     pairs from anywhere in the set, which follow the batch as companions: `chosen_info_nce`
    hard       the likest wrong pairs of the set, found once an epoch; they join the batch, and `info_nce` goes over all of it,
               so that easy negatives keep the hard ones from pulling the space together
"""

import math

import torch

from core.vision.contrastive import PairIds

_TRIES = 16


def shuffled(ids: PairIds, generator: torch.Generator) -> torch.Tensor:
    """int64 [B, 1]: in a random circle of the B pairs, the next one that is wrong for the pair."""
    pairs = len(ids.images)
    order = torch.randperm(pairs, generator=generator, device=generator.device).to(ids.images.device)
    chosen = torch.full_like(order, -1)
    open_places = torch.arange(pairs, device=order.device)
    for shift in range(1, pairs):
        if not len(open_places):
            break
        ours, theirs = order[open_places], order[(open_places + shift) % pairs]
        wrong = ~_share(ids, ours, theirs)
        chosen[ours[wrong]] = theirs[wrong]
        open_places = open_places[~wrong]
    return chosen[:, None]


def random_wrong(ids: PairIds, count: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [N, count]: for each pair of the set, `count` wrong ones, each drawn evenly from all that are."""
    rows = torch.arange(len(ids.images), device=ids.images.device)[:, None].expand(-1, count).reshape(-1)
    chosen = torch.full_like(rows, -1)
    missing = torch.arange(len(rows), device=rows.device)
    for _ in range(_TRIES):
        if not len(missing):
            break
        drawn = _integers(len(ids.images), len(missing), generator).to(rows.device)
        wrong = ~_share(ids, rows[missing], drawn)
        chosen[missing[wrong]] = drawn[wrong]
        missing = missing[~wrong]
    # Rows that share with nearly all others: drawn from the list of what is left, if anything is.
    for place in missing.tolist():
        row = int(rows[place])
        allowed = (~ids.shared(slice(row, row + 1), slice(None))[0]).nonzero()[:, 0]
        if len(allowed):
            chosen[place] = allowed[_integers(len(allowed), 1, generator).to(rows.device)[0]]
    return chosen.reshape(-1, count)


@torch.no_grad()
def hardest_wrong(images: torch.Tensor, texts: torch.Tensor, ids: PairIds, count: int, *, block: int = 2048) -> torch.Tensor:
    """int64 [N, count]: the wrong pairs a model is likeliest to confuse with each, the likest first.

    `images` and `texts` are unit features [N, D] of the whole set by the model as it is now. A pair is as hard as the better of
    its caption's similarity to the picture and its picture's to the caption. No more than block² similarities are held.
    """
    pairs = len(images)
    found = []
    for start in range(0, pairs, block):
        i = slice(start, min(start + block, pairs))
        best = images.new_full((i.stop - i.start, count), -math.inf, dtype=torch.float32)
        rows = torch.full_like(best, -1, dtype=torch.int64)
        for first in range(0, pairs, block):
            j = slice(first, min(first + block, pairs))
            likeness = torch.maximum(images[i].float() @ texts[j].float().T, texts[i].float() @ images[j].float().T)
            likeness.masked_fill_(ids.shared(i, j), -math.inf)
            numbers = torch.arange(j.start, j.stop, device=rows.device).expand_as(likeness)
            best, place = torch.cat([best, likeness], 1).topk(count, dim=1)
            rows = torch.cat([rows, numbers], 1).gather(1, place)
        found.append(rows.masked_fill(best == -math.inf, -1))
    return torch.cat(found)


def _share(ids: PairIds, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ids.images[ours] == ids.images[theirs]) | (ids.texts[ours] == ids.texts[theirs])


def _integers(below: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(below, (count,), generator=generator, device=generator.device)
