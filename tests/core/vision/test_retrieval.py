"""Recall and zero-shot accuracy against sorted lists, geometry against its formulas."""

import math
from collections.abc import Callable

import pytest
import torch

from core.vision.geometry import alignment, kept_direction, retention, uniformity
from core.vision.retrieval import recall
from core.vision.zero_shot import class_features, class_sentences, zero_shot_accuracy

Unit = Callable[..., torch.Tensor]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [4, 1000])
def test_recall_is_what_sorting_finds(unit: Unit, seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, texts = unit(13, 6, seed=seed).detach(), unit(40, 6, seed=seed + 50).detach()
    owners = torch.cat([torch.arange(13), torch.randint(13, (27,), generator=generator)])
    text_ids = torch.randint(30, (40,), generator=generator)
    texts = texts[text_ids]  # equal texts have equal features
    right = torch.zeros(13, 40, dtype=torch.bool)
    for i in range(13):
        for t in range(40):
            right[i, t] = bool((text_ids[owners == i] == text_ids[t]).any())
    near = images @ texts.T
    found = recall(images, texts, owners, text_ids, block=block)
    for k in (1, 5, 10):
        # Of equal features the wrong ones stand before the right ones: an order by (-similarity, right).
        rows = [sorted(range(40), key=lambda t: (-near[i, t].item(), bool(right[i, t])))[:k] for i in range(13)]
        columns = [sorted(range(13), key=lambda i: (-near[i, t].item(), bool(right[i, t])))[:k] for t in range(40)]
        assert found.image_to_text[k] == pytest.approx(sum(bool(right[i, r].any()) for i, r in enumerate(rows)) / 13)
        assert found.text_to_image[k] == pytest.approx(sum(bool(right[c, t].any()) for t, c in enumerate(columns)) / 40)


def test_a_model_whose_features_are_all_one_finds_nothing() -> None:
    same = torch.ones(20, 4) / 2
    found = recall(same, same, torch.arange(20))
    assert set(found.image_to_text.values()) == set(found.text_to_image.values()) == {0.0}
    assert zero_shot_accuracy(same, same[:7], torch.zeros(20, dtype=torch.int64)) == {1: 0.0, 5: 0.0}


def test_a_caption_that_is_another_pictures_word_for_word_is_a_hit() -> None:
    images = torch.eye(2)
    texts = torch.eye(2)[[0, 0]]  # both pictures are called the same
    ids = torch.tensor([4, 4])
    assert recall(images, texts, torch.arange(2), ids, at=[1]).image_to_text == {1: 1.0}
    assert recall(images, texts, torch.arange(2), at=[1]).image_to_text == {1: 0.0}


@pytest.mark.parametrize("owners", [[0, 0, 0], [0, 1, 5], [0, 1]])
def test_owners_that_leave_a_picture_out_are_refused(unit: Unit, owners: list[int]) -> None:
    with pytest.raises(ValueError, match="owners"):
        recall(unit(2), unit(3), torch.tensor(owners))


def test_zero_shot_accuracy_by_hand() -> None:
    classes = class_features(torch.eye(4)[[0, 0, 1, 2, 3, 3]], classes=3)  # of two sentences each; the second lies between
    assert classes[1].tolist() == pytest.approx([0, math.sqrt(0.5), math.sqrt(0.5), 0])
    images = torch.eye(4)
    found = zero_shot_accuracy(images, classes, torch.tensor([0, 1, 0, 2]), at=[1, 2])
    assert found == {1: 0.75, 2: 0.75}  # the third picture's class ties with the last for the second place
    with pytest.raises(ValueError, match="from 0 to 2"):
        zero_shot_accuracy(images, classes, torch.tensor([0, 1, 2, 3]))


def test_class_sentences_name_all_that_is_wrong() -> None:
    assert class_sentences(["cat", "dog"], ["a {}", "the {}"]) == ["a cat", "the cat", "a dog", "the dog"]
    with pytest.raises(ValueError, match=r"'no place'.*class 2 has no name; class 3 has the name 'cat'"):
        class_sentences(["cat", " ", "cat"], ["no place"])
    with pytest.raises(ValueError, match="at least one"):
        class_sentences([])


def test_geometry_is_its_formulas(unit: Unit) -> None:
    images, texts = unit(30, 8, seed=1).detach(), unit(30, 8, seed=2).detach()
    assert float(alignment(images, texts)) == pytest.approx((images - texts).norm(dim=1).pow(2).mean().item(), rel=1e-5)
    expected = torch.pdist(images).pow(2).mul(-2).exp().mean().log().item()
    assert float(uniformity(images)) == pytest.approx(expected, rel=1e-4)
    assert float(uniformity(images, block=7)) == pytest.approx(expected, rel=1e-4)
    assert float(uniformity(images[:1].expand(9, -1))) == pytest.approx(0, abs=1e-5)
    assert float(alignment(images, images)) == 0
    assert kept_direction(images, images) == pytest.approx(1)
    with pytest.raises(ValueError, match="two or more"):
        uniformity(images[:1])


def test_retention_is_a_ratio_of_what_was_measured_alike() -> None:
    assert retention({"a": 0.3, "b": 0.1}, {"a": 0.6, "b": 0.0}) == {"a": 0.5}
    with pytest.raises(ValueError, match="a, b"):
        retention({"a": 1.0}, {"b": 1.0})
