"""From the uint8 pixels of a picture cache to the numbers that a model takes: value × scale, less the mean, by the deviation.

The model's image processor says which; done where the model is, so that a cache and a transfer hold a byte a value.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.pictures.resize import read_processor
from core.errors import InvalidInput, Problem

_CHANNELS = 3


@dataclass(frozen=True)
class Normalisation:
    """By channel: red, green, blue."""

    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of_model(cls, folder: Path) -> "Normalisation":
        """Of a model folder's processor. Raises InvalidInput where it says none that can be followed."""
        config = read_processor(folder)
        scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
        if not config.get("do_normalize", True):
            return cls(scale, (0.0,) * _CHANNELS, (1.0,) * _CHANNELS)
        return cls(scale, _channels(config, "image_mean"), _channels(config, "image_std"))


def _channels(config: dict[str, Any], name: str) -> tuple[float, ...]:
    values = config.get(name)
    if isinstance(values, list) and len(values) == _CHANNELS and all(isinstance(value, int | float) for value in values):
        numbers = tuple(float(value) for value in values)
        if name == "image_mean" or min(numbers) > 0:
            return numbers
    message = f"expected {_CHANNELS} numbers, found {values}"
    raise InvalidInput("The image processor can't be followed", [Problem("bad-normalisation", message, field=name)])
