"""Augmentations: off by default, and fixed by (seed, epoch, row) whatever came before."""

import numpy as np
import pytest
from PIL import Image

from core.data.pictures.augment import (
    AUGMENTATIONS,
    Augmentation,
    ColourJitter,
    Grayscale,
    HorizontalFlip,
    RandomResizedCrop,
    augment,
)
from tests.core.data.pictures.draw import noise, quarters

ALL: list[Augmentation] = [RandomResizedCrop((12, 10), scale=(0.3, 1.0)), HorizontalFlip(), ColourJitter(), Grayscale(0.5)]


def test_no_plan_changes_nothing() -> None:
    pixels = noise(0)
    assert augment(pixels, (), seed=0, epoch=0, row=0) is pixels


def test_the_same_place_gives_the_same_picture_in_any_order() -> None:
    pixels = noise(0, 40, 30)
    places = [(seed, epoch, row) for seed in (0, 1) for epoch in (0, 1) for row in range(5)]
    there = {place: augment(pixels, ALL, seed=place[0], epoch=place[1], row=place[2]) for place in places}
    back = {place: augment(pixels, ALL, seed=place[0], epoch=place[1], row=place[2]) for place in reversed(places)}
    assert all(np.array_equal(there[place], back[place]) for place in places)
    assert len({picture.tobytes() for picture in there.values()}) == len(places)
    assert all(picture.shape == (12, 10, 3) and picture.dtype == np.uint8 for picture in there.values())


def test_a_step_more_leaves_those_before_it_as_they_were() -> None:
    pixels = noise(0, 40, 30)
    for row in range(10):
        before = augment(pixels, ALL[:1], seed=3, epoch=1, row=row)
        after = augment(pixels, [ALL[0], HorizontalFlip(1.0)], seed=3, epoch=1, row=row)
        assert np.array_equal(after, before[:, ::-1])


def test_flips_and_greys_come_as_often_as_asked() -> None:
    pixels = quarters()
    grey = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
    flips = [augment(pixels, [HorizontalFlip(0.3)], seed=0, epoch=0, row=row) for row in range(400)]
    greys = [augment(pixels, [Grayscale(0.3)], seed=0, epoch=0, row=row) for row in range(400)]
    for pictures, changed in ((flips, pixels[:, ::-1]), (greys, grey)):
        share = np.mean([np.array_equal(picture, changed) for picture in pictures])
        assert 0.22 < share < 0.38
        assert all(np.array_equal(picture, changed) or np.array_equal(picture, pixels) for picture in pictures)


@pytest.mark.parametrize("size", [(40, 30), (3, 200), (1, 1)])
def test_crops_are_parts_of_the_picture_of_the_share_asked_for(size: tuple[int, int]) -> None:
    height, width = size
    places = np.zeros((height, width, 3), np.uint8)
    places[..., 0] = np.linspace(0, 255, width)[None]
    places[..., 1] = np.linspace(0, 255, height)[:, None]
    for row in range(30):
        crop = augment(places, [RandomResizedCrop((8, 8), scale=(0.5, 0.6))], seed=0, epoch=0, row=row)
        assert crop.shape == (8, 8, 3)
        if size == (40, 30):
            spans = np.ptp(crop[..., 0].astype(float)) / 255 * np.ptp(crop[..., 1].astype(float)) / 255
            assert 0.3 < spans < 0.6  # 7 of 8 steps are spanned each way


def test_jitter_stays_within_its_bounds_and_can_be_nothing() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    found = {int(augment(grey, [ColourJitter(0.2, 0.0, 0.0)], seed=0, epoch=0, row=row)[0, 0, 0]) for row in range(100)}
    assert len(found) > 10
    assert min(found) >= 80
    assert max(found) <= 120
    assert np.array_equal(augment(noise(0), [ColourJitter(0, 0, 0)], seed=0, epoch=0, row=0), noise(0))


def test_names_are_in_step() -> None:
    assert {type(step) for step in ALL} == set(AUGMENTATIONS.values())
