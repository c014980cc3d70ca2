"""The plain contrastive losses, against formulas written out and against what duplicates ought to mean."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from core.vision.contrastive import (
    MAX_LOG_SCALE,
    PairIds,
    chosen_info_nce,
    hold_log_scale,
    info_nce,
    log_scale_of,
    scale_of,
    siglip,
)

Unit = Callable[..., torch.Tensor]
SCALE = torch.tensor(1 / 0.07)


def ids_of(images: list[int], texts: list[int]) -> PairIds:
    return PairIds(torch.tensor(images), torch.tensor(texts))


@pytest.mark.parametrize("pairs", [1, 2, 7, 33])
def test_without_duplicates_it_is_transformers_loss(unit: Unit, pairs: int) -> None:
    images, texts = unit(pairs, seed=1), unit(pairs, seed=2)
    expected = image_text_contrastive_loss(SCALE * texts @ images.T)
    for ids in (None, PairIds.distinct(pairs)):
        torch.testing.assert_close(info_nce(images, texts, SCALE, ids), expected, rtol=1e-6, atol=1e-6)


def test_a_pair_held_twice_counts_as_if_its_batch_held_it_once(unit: Unit) -> None:
    images, texts = unit(5, seed=1).detach(), unit(5, seed=2).detach()
    twice = torch.tensor([0, 1, 2, 3, 4, 0])
    ids = PairIds(twice, twice)
    logits = SCALE * images[twice] @ texts[twice].T
    expected = 0.0
    for row in range(6):
        once = [j for j in range(6) if j == row or twice[j] != twice[row]]
        place = torch.tensor([once.index(row)])
        expected += float(cross_entropy(logits[row, once][None], place) + cross_entropy(logits[once, row][None], place)) / 12
    assert float(info_nce(images[twice], texts[twice], SCALE, ids)) == pytest.approx(expected, abs=1e-6)
    assert float(info_nce(images[twice], texts[twice], SCALE)) > expected + 0.01, "as negatives they cost"


def test_a_shared_caption_or_a_shared_picture_is_no_negative(unit: Unit) -> None:
    images, texts = unit(4, seed=1), unit(4, seed=2)
    ids = ids_of([0, 1, 2, 2], [0, 0, 1, 2])  # rows 0 and 1 share a caption, rows 2 and 3 a picture
    info_nce(images, texts, SCALE, ids).backward()
    blind = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    again, other = images.detach().requires_grad_(), texts.detach().requires_grad_()
    logits = (SCALE * again @ other.T).masked_fill(blind, -1e9)
    image_text_contrastive_loss(logits).backward()
    torch.testing.assert_close(images.grad, again.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(texts.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairs", [1, 4])
def test_where_all_is_alike_nothing_is_asked(unit: Unit, pairs: int) -> None:
    images, texts = unit(pairs, seed=1), unit(pairs, seed=2)
    alike = ids_of([7] * pairs, list(range(pairs)))
    loss = info_nce(images, texts, SCALE, alike)
    loss.backward()
    assert loss.item() == 0
    assert not images.grad.any()
    assert not texts.grad.any()


def test_the_loss_is_fp32_under_autocast(unit: Unit) -> None:
    images, texts = unit(16, seed=1), unit(16, seed=2)
    plain = info_nce(images, texts, torch.tensor(100.0)), siglip(images, texts, torch.tensor(100.0), torch.tensor(-10.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = info_nce(images, texts, torch.tensor(100.0)), siglip(images, texts, torch.tensor(100.0), torch.tensor(-10.0))
    assert plain == cast
    assert cast[0].dtype == torch.float32


def test_siglip_is_the_papers_sum(unit: Unit) -> None:
    images, texts, bias = unit(6, seed=1).detach(), unit(6, seed=2).detach(), torch.tensor(-10.0)
    expected = 0.0
    for i in range(6):
        for j in range(6):
            logit = 10 * float(images[i] @ texts[j]) - 10
            expected += math.log1p(math.exp(-logit if i == j else logit)) / 6
    assert float(siglip(images, texts, torch.tensor(10.0), bias)) == pytest.approx(expected, rel=1e-5)
    alike = ids_of([0] * 6, [0] * 6)
    own = sum(math.log1p(math.exp(10 - 10 * float(images[i] @ texts[i]))) for i in range(6)) / 6
    assert float(siglip(images, texts, torch.tensor(10.0), bias, alike)) == pytest.approx(own, rel=1e-5)


def test_chosen_negatives_of_all_others_are_the_in_batch_loss(unit: Unit) -> None:
    images, texts = unit(5, seed=1), unit(5, seed=2)
    others = torch.tensor([[j for j in range(5) if j != i] for i in range(5)])
    torch.testing.assert_close(chosen_info_nce(images, texts, SCALE, others), info_nce(images, texts, SCALE))


def test_chosen_negatives_may_be_companions_or_missing(unit: Unit) -> None:
    images, texts = unit(4, seed=1), unit(4, seed=2)
    loss = chosen_info_nce(images, texts, SCALE, torch.tensor([[3], [-1]]))
    logits = SCALE * images @ texts.T
    expected = (torch.log1p((logits[0, 3] - logits[0, 0]).exp()) + torch.log1p((logits[3, 0] - logits[0, 0]).exp())) / 4
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert images.grad[3].any()
    assert not images.grad[1].any()
    assert torch.isfinite(images.grad).all()


def test_the_temperature_is_held() -> None:
    assert float(scale_of(torch.tensor(log_scale_of(0.07)))) == pytest.approx(1 / 0.07)
    assert log_scale_of(0.01) == pytest.approx(MAX_LOG_SCALE)
    parameter = torch.tensor([9.0], requires_grad=True)
    assert scale_of(parameter).item() == pytest.approx(100)
    hold_log_scale(parameter)
    scale = scale_of(parameter)
    assert scale.shape == ()
    assert scale.dtype == torch.float32
    scale.backward()
    assert parameter.grad == pytest.approx(100), "at the bound there is a way back"


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.009, math.nan, math.inf])
def test_a_temperature_it_can_not_hold_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"0\.01 or more"):
        log_scale_of(temperature)


@pytest.mark.parametrize(("rows", "width"), [(3, 16), (4, 8), (0, 16)])
def test_what_is_not_pairs_is_refused(unit: Unit, rows: int, width: int) -> None:
    with pytest.raises(ValueError, match="not pairs"):
        info_nce(unit(4), unit(rows, width), SCALE) if rows else info_nce(unit(0), unit(0), SCALE)
    with pytest.raises(ValueError, match="3 picture ids"):
        info_nce(unit(4), unit(4), SCALE, PairIds.distinct(3))
