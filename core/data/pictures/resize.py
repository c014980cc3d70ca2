"""A picture at the size a model takes: the uint8 pixels that the model's own image processor makes of it.

transformers' processors resize 8-bit pictures with Pillow (convolution over all pixels that shrink into one, so no aliasing)
and crop afterwards; what is left for the trainer is value / 255, less the mean, by the deviation. `ResizeRule.apply` gives the
same pixels to the last bit, but for one case. A crop that lies inside the picture is made within the resize, which then
computes nothing that is cut away, a quarter of its time; since Pillow's box is single precision, up to one value in a thousand
is then off by one level of 255.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from core.data.pictures.decode import Pixels
from core.errors import InvalidInput, Problem
from core.model_folder import PROCESSOR_FILES

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
_RESAMPLE: dict[Resample, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
LARGEST_SIDE = 4096
_SQUARE_SIDE = 8192


@dataclass(frozen=True)
class ResizeRule:
    """In this order, each where it is set: pad to a square, resize, crop the centre.

    `square` is the colour of the bars that make a picture square. `size` is the shorter side in pixels, which keeps the shape,
    or (height, width), which does not. `crop` is (height, width); where a picture is smaller, black goes round it.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None = None
    resample: Resample = "bicubic"
    square: tuple[int, int, int] | None = None

    @classmethod
    def of_processor(cls, config: Mapping[str, Any]) -> "ResizeRule":
        """The rule of an image processor's configuration, as in preprocessor_config.json.

        A bare number as `size` is what old files have: of the shorter side where a crop follows, as CLIP's meant it, else of
        both sides. Raises InvalidInput, with every field that asks for something else than a ResizeRule does.
        """
        problems: list[Problem] = []
        crop = _sides(config, "crop_size", problems) if config.get("do_center_crop") else None
        size = _sides(config, "size", problems, is_short=crop is not None) if config.get("do_resize", True) else None
        resample = list(_RESAMPLE)[config.get("resample", 3)] if config.get("resample", 3) in range(6) else None
        if resample is None:
            problems.append(Problem("unknown-resample", f"resample {config['resample']} is none of Pillow's", field="resample"))
        if problems or resample is None or isinstance(crop, int):
            raise InvalidInput("The image processor can't be followed", problems)
        mean = config.get("image_mean") or (0.0, 0.0, 0.0)
        square = tuple(int(value * 255) for value in mean) if config.get("do_pad") else None
        return cls(size, crop, resample, square)  # type: ignore[arg-type]

    @classmethod
    def of_model(cls, folder: Path) -> "ResizeRule":
        """The rule of a model folder's processor. Raises InvalidInput, also where the folder has none."""
        return cls.of_processor(read_processor(folder))

    def facts(self) -> dict[str, Any]:
        """As JSON: equal for equal rules, so fit for a key."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def loose(self, room: float = 1.25) -> "ResizeRule":
        """The rule of a cache that augmentations crop from: the shape kept, nothing cut, the shorter side `room` times as long
        as the longer one of what this rule gives. Raises InvalidInput where this rule gives no fixed size."""
        given = self.crop or self.size
        if not isinstance(given, tuple):
            raise InvalidInput("Pictures of no fixed size can't be augmented by cropping")
        return ResizeRule(round(max(given) * room), None, self.resample)

    def apply(self, image: Image.Image) -> Pixels:
        """uint8 [height, width, 3] of an RGB picture, contiguous."""
        if self.square is not None:
            image = _squared(image, self.square)
        wide, high = image.size if self.size is None else _resized(image.size, self.size)
        height, width = self.crop or (high, wide)
        # Rounded as transformers rounds: down where something is cut, up where something is added.
        left, top = (wide - width) // 2, (high - height) // 2
        resample = _RESAMPLE[self.resample]
        if self.size is not None and left >= 0 and top >= 0:
            across, down = image.width / wide, image.height / high
            right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
            return np.asarray(image.resize((width, height), resample, box=(left * across, top * down, right, bottom)))
        if self.size is not None:
            image = image.resize((wide, high), resample)
        return np.asarray(image.crop((left, top, left + width, top + height)))


def read_processor(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder's image processor: preprocessor_config.json, or within processor_config.json, as
    transformers 5 writes it. Raises InvalidInput where the folder has neither."""
    for name in PROCESSOR_FILES:
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise InvalidInput(f"{name} can't be read: {error}") from None
        if isinstance(config, dict) and isinstance(config := config.get("image_processor", config), dict) and "size" in config:
            return config
    message = "the model has no image processor: neither preprocessor_config.json nor processor_config.json gives a size"
    raise InvalidInput(message, [Problem("missing-file", message)])


def _resized(size: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height), with the longer side cut off to a whole number as transformers and torchvision do."""
    if isinstance(wanted, tuple):
        return wanted[1], wanted[0]
    short, long = min(size), max(size)
    # A sliver of a picture must not become a memory bomb by keeping its shape.
    other = min(int(wanted * long / short), LARGEST_SIDE * 4)
    return (wanted, other) if size[0] <= size[1] else (other, wanted)


def _squared(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    if side > _SQUARE_SIDE:  # a line of a million pixels would need a million times as many round it
        image = image.resize(tuple(max(1, length * _SQUARE_SIDE // side) for length in image.size))  # type: ignore[arg-type]
        side = _SQUARE_SIDE
    ground = Image.new("RGB", (side, side), colour)
    ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground


def _sides(
    config: Mapping[str, Any], name: str, problems: list[Problem], *, is_short: bool = False
) -> int | tuple[int, int] | None:
    given = config.get(name)
    if isinstance(given, Mapping):
        values = {key: value for key, value in given.items() if value is not None}
    elif is_short:
        values = {"shortest_edge": given}
    else:
        values = {"height": given, "width": given}
    if not all(isinstance(value, int) and 1 <= value <= LARGEST_SIDE for value in values.values()):
        problems.append(Problem("bad-size", f"expected whole numbers from 1 to {LARGEST_SIDE}, found {given}", field=name))
    elif values.keys() == {"height", "width"}:
        return values["height"], values["width"]
    elif values.keys() == {"shortest_edge"} and name == "size":
        side: int = values["shortest_edge"]
        return side
    else:
        problems.append(Problem("bad-size", f"{sorted(values)} is no way to give a size that is known here", field=name))
    return None
