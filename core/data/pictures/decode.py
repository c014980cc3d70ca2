"""The bytes of a picture as upright RGB: the one decoder, for what is trained on and what is asked of an endpoint.

Formats are told by content and only those of FORMATS are tried. The size is judged by the header, before a pixel is made.

- Orientation: the EXIF tag is applied, so a picture lies as a person sees it.
- Transparency (RGBA, LA, palettes and colour keys): laid over BACKGROUND. Dropping it, as a plain convert("RGB") does, shows
  whatever colour the invisible pixels happen to have.
- CMYK and YCCK JPEGs are read as inverted, as Adobe writes them and every browser expects; colour profiles are not applied.
- 16-bit grey is scaled to 8 bits by v/257, rounded; 16-bit colour PNGs come from the decoder as 8 bits.
- Animations and files of several pages: the first frame, and a note that says so.

core.run.DECODER_VERSION belongs in the name of everything made with it.
"""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from core.data.strict_json import plain
from core.errors import InvalidInput, Problem

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_PIXELS = 64 << 20
"""67 million: the largest phone cameras' usual size, and 200 MB in memory."""
BACKGROUND = (255, 255, 255)

Pixels = npt.NDArray[np.uint8]
"""[height, width, 3], RGB."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.3, tag 274 -> what sets the stored picture upright."""
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_PLAIN = ("1", "L", "RGB", "CMYK", "YCbCr", "HSV")


class Decoded(NamedTuple):
    """`image` is upright RGB, maybe reduced; `width` and `height` are those of the picture itself, upright too."""

    image: Image.Image
    width: int
    height: int
    format: str
    notes: tuple[str, ...]

    @property
    def pixels(self) -> Pixels:
        return np.asarray(self.image)


def decode_picture(data: bytes, name: str, *, at_least: int | None = None, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode a picture. `name` is what errors call it. Raises InvalidInput, code `bad-image`.

    With `at_least`, a JPEG may come reduced by 2, 4 or 8, as long as its shorter side keeps so many pixels: the decoder then
    makes only the coefficients of the smaller picture, which is several times faster, and is not what a full decode and a
    resize give, to the last bit.
    """
    try:
        return _decode(data, at_least, max_pixels)
    except _RefusedError as error:
        reason = str(error)
    except Image.DecompressionBombError:
        reason = _too_large(max_pixels)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        reason = f"not a picture of a known format ({known})" if data else "an empty file"
    except Exception as error:  # what a decoder raises over hostile bytes is anyone's guess, and all of it means the same
        reason = f"can't be decoded: {plain(str(error)) or type(error).__name__}"
    message = f"{name}: {reason}"
    raise InvalidInput(message, [Problem("bad-image", message)])


class _RefusedError(Exception):
    pass


def _decode(data: bytes, at_least: int | None, max_pixels: int) -> Decoded:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise _RefusedError(f"{width} x {height} pixels; {_too_large(max_pixels)}")
        format_name = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG with further pictures behind it
        notes = _notes(image, format_name)
        orientation = _orientation(image, notes)
        if at_least is not None and format_name == "JPEG":
            image.draft(None, (at_least, at_least) if min(width, height) >= at_least else (width, height))
        image.load()
        upright = _rgb(image)
        if format_name == "TIFF":
            orientation = 1  # Pillow turns these itself while it loads, and names the upright size from the start
        if orientation in _UPRIGHT:
            upright = upright.transpose(_UPRIGHT[orientation])
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return Decoded(upright, width, height, format_name, tuple(notes))


def _too_large(max_pixels: int) -> str:
    return f"a picture may have {max_pixels} pixels"


def _notes(image: Image.Image, format_name: str) -> list[str]:
    if format_name == "JPEG" or not getattr(image, "is_animated", False):
        return []
    return ["several pages: the first is used" if format_name == "TIFF" else "animated: the first frame is used"]


def _orientation(image: Image.Image, notes: list[str]) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data, again of any kind; the picture itself may be whole
        notes.append("EXIF data that can't be read: taken as upright")
        return 1
    return found if isinstance(found, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode in _GREY_16:
        return _from_16_bits(np.asarray(image))
    if mode == "I":
        return _from_32_bits(np.asarray(image))
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _over_background(image)
    if mode == "RGB":
        return image
    if mode in _PLAIN or mode == "P":
        return image.convert("RGB")
    raise _RefusedError(f"pixels of the kind {mode} can't be read; save it as 8-bit RGB")


def _over_background(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
    return Image.alpha_composite(ground, layer).convert("RGB")


def _from_16_bits(values: npt.NDArray[np.uint16]) -> Image.Image:
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _from_32_bits(values: npt.NDArray[np.int32]) -> Image.Image:
    """Pillow reads some 16-bit files, and palette-less 32-bit ones, as int32. Only the former have a known white."""
    if values.size and (values.min() < 0 or values.max() > 65_535):
        raise _RefusedError("32-bit grey values, of which nothing says what is white; save it as 8- or 16-bit")
    return _from_16_bits(values.astype(np.uint16))
