"""Augmentations of pictures: off unless named, and the same for the same (seed, epoch, row), in whatever order rows come.

So a resumed run sees what an uninterrupted one would have, and a batch encoded twice (GradCache) is the same batch. They take
and give uint8 pixels, on the host; a new one is a class here and a line in AUGMENTATIONS. A mirrored picture may contradict
its caption ("left of", text in the picture), which is one reason why nothing is on by default.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageEnhance

from core.data.pictures.decode import Pixels


class Augmentation(Protocol):
    """Change a picture; every choice is drawn from `random`, and the same number of draws is made whatever they say."""

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image: ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """A part of `scale` of the area and of `ratio` (width by height), resized to (height, width) with bicubic.

    The part is drawn as in Szegedy et al. 2015 (arXiv 1409.4842, section 6): area uniform, ratio uniform in its logarithm.
    The default scale is CLIP's gentle one; 0.08 is the classifiers' habit.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        share, shape, across, down = random.random(4)
        area = image.width * image.height * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
        low, high = (math.log(bound) for bound in self.ratio)
        ratio = math.exp(low + shape * (high - low))
        # Where the part would stick out its ratio gives way, not its place.
        width = min(image.width, max(1, round(math.sqrt(area * ratio))))
        height = min(image.height, max(1, round(math.sqrt(area / ratio))))
        left = min(int(across * (image.width - width + 1)), image.width - width)
        top = min(int(down * (image.height - height + 1)), image.height - height)
        box = (left, top, left + width, top + height)
        return image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=box)


@dataclass(frozen=True)
class HorizontalFlip:
    probability: float = 0.5

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        is_flipped = random.random() < self.probability
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else image


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast and saturation by factors within 1 ± each, in a drawn order."""

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        factors = 1 + (2 * random.random(3) - 1) * (self.brightness, self.contrast, self.saturation)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for which in random.permutation(3):
            image = enhancers[which](image).enhance(max(0.0, float(factors[which])))
        return image


@dataclass(frozen=True)
class Grayscale:
    probability: float = 0.1

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        return image.convert("L").convert("RGB") if random.random() < self.probability else image


AUGMENTATIONS: dict[str, type[Augmentation]] = {
    "random_resized_crop": RandomResizedCrop,
    "horizontal_flip": HorizontalFlip,
    "colour_jitter": ColourJitter,
    "grayscale": Grayscale,
}


def augment(pixels: Pixels, plan: Sequence[Augmentation], *, seed: int, epoch: int, row: int) -> Pixels:
    """uint8 [height, width, 3] with the plan applied in order. Each step has its own stream of chance, so that adding one to
    the end of a plan changes nothing before it."""
    if not plan:
        return pixels
    image = Image.fromarray(pixels)
    for place, step in enumerate(plan):
        image = step(image, np.random.default_rng((seed, epoch, row, place)))
    return np.asarray(image)
