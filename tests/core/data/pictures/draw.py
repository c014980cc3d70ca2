"""Pictures with known pixels, and archives of them."""

import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

DATA = Path(__file__).resolve().parents[4] / ".." / "shared" / "data"


def quarters(height: int = 24, width: int = 16) -> npt.NDArray[np.uint8]:
    """A colour in each corner, so that every turn and mirror image differs: red green / blue white."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (250, 10, 10)
    pixels[: height // 2, width // 2 :] = (10, 250, 10)
    pixels[height // 2 :, : width // 2] = (10, 10, 250)
    pixels[height // 2 :, width // 2 :] = (250, 250, 250)
    return pixels


def noise(seed: int, height: int = 24, width: int = 16) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(image: Image.Image | npt.NDArray[np.uint8], format_name: str = "PNG", **options: object) -> bytes:
    """The bytes of a picture."""
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, format_name, **options)
    return file.getvalue()


def write_zip(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w", style: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=style) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
