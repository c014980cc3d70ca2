"""Choosers of negatives: never a pair of the same picture or caption, all others in reach."""

from collections.abc import Callable

import pytest
import torch

from core.vision.contrastive import PairIds, chosen_info_nce
from core.vision.negatives import hardest_wrong, random_wrong, shuffled

Unit = Callable[..., torch.Tensor]


def drawn_ids(pairs: int, kinds: int, seed: int) -> PairIds:
    images, texts = torch.randint(kinds, (2, pairs), generator=torch.Generator().manual_seed(seed))
    return PairIds(images, texts)


def allowed_of(ids: PairIds) -> list[set[int]]:
    wrong = ~ids.shared(slice(None), slice(None))
    return [set(row.nonzero()[:, 0].tolist()) for row in wrong]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kinds", [1, 2, 3, 50])
def test_nobody_gets_his_own(unit: Unit, kinds: int, seed: int) -> None:
    ids, generator = drawn_ids(23, kinds, seed), torch.Generator().manual_seed(seed)
    for chosen in (shuffled(ids, generator), random_wrong(ids, 3, generator)):
        for picks, allowed in zip(chosen.tolist(), allowed_of(ids), strict=True):
            assert set(picks) <= (allowed or {-1})
    hard = hardest_wrong(unit(23, seed=seed), unit(23, seed=seed + 1), ids, 3, block=7)
    for picks, allowed in zip(hard.tolist(), allowed_of(ids), strict=True):
        found = [pick for pick in picks if pick != -1]
        assert len(set(found)) == len(found) == min(3, len(allowed))
        assert set(found) <= allowed


def test_random_ones_are_drawn_from_all_and_by_the_seed() -> None:
    ids = PairIds(torch.tensor([0, 0, 1, 2, 3]), torch.arange(5))
    drawn = random_wrong(ids, 3000, torch.Generator().manual_seed(1))
    counts = torch.bincount(drawn[0], minlength=5)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:].min() > 900
    assert torch.equal(drawn, random_wrong(ids, 3000, torch.Generator().manual_seed(1)))


def test_without_duplicates_a_shuffle_is_a_shift(unit: Unit) -> None:
    chosen = shuffled(PairIds.distinct(9), torch.Generator().manual_seed(3))
    assert sorted(chosen[:, 0].tolist()) == list(range(9))
    assert chosen_info_nce(unit(9, seed=1), unit(9, seed=2), torch.tensor(14.0), chosen).item() > 0


@pytest.mark.parametrize("block", [3, 100])
def test_the_hardest_are_the_likest_either_way(unit: Unit, block: int) -> None:
    images, texts = unit(20, 4, seed=1).detach(), unit(20, 4, seed=2).detach()
    likeness = torch.maximum(images @ texts.T, texts @ images.T).fill_diagonal_(-2)
    expected = likeness.topk(4, dim=1).indices
    assert torch.equal(hardest_wrong(images, texts, PairIds.distinct(20), 4, block=block), expected)


def test_a_pair_alone_has_no_negative_and_no_loss(unit: Unit) -> None:
    alone, generator = PairIds.distinct(1), torch.Generator()
    images, texts = unit(1, seed=1), unit(1, seed=2)
    for chosen in (shuffled(alone, generator), random_wrong(alone, 2, generator), hardest_wrong(images, texts, alone, 2)):
        assert (chosen == -1).all()
        assert chosen_info_nce(images, texts, torch.tensor(14.0), chosen).item() == 0
