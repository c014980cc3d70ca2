"""The decoder on pictures whose pixels are known: every orientation, colour model, depth and kind of transparency."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from core.data.pictures.decode import BACKGROUND, Decoded, decode_picture
from core.errors import InvalidInput
from tests.core.data.pictures.draw import DATA, noise, quarters, saved

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the test data is not beside this checkout")
_STORED = {  # EXIF orientation -> how a camera that says so has stored an upright picture (numpy, written apart from Pillow's)
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


def decode(data: bytes, **options: int) -> Decoded:
    return decode_picture(data, "p", **options)


def refusal(data: bytes, **options: int) -> str:
    with pytest.raises(InvalidInput) as error:
        decode(data, **options)
    (problem,) = error.value.problems
    assert problem.code == "bad-image"
    return problem.message


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_every_orientation_is_the_upright_picture(orientation: int, format_name: str) -> None:
    upright = quarters()
    image = Image.fromarray(np.ascontiguousarray(_STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format_name, {})
    found = decode(saved(image, format_name, exif=exif, **options))
    assert (found.width, found.height, found.format) == (16, 24, format_name)
    tolerance = 4 if format_name == "JPEG" else 0
    assert np.abs(found.pixels.astype(int) - upright).max() <= tolerance


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_orientation_that_is_none_and_broken_exif_leave_the_picture_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert np.array_equal(decode(saved(quarters(), exif=exif)).pixels, quarters())
    plain = saved(quarters(), "JPEG", quality=100, subsampling=0)
    junk = b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\xff" * 40
    broken = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(junk) + 2) + junk + plain[2:]
    assert np.array_equal(decode(broken).pixels, decode(plain).pixels)


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(format_name: str) -> None:
    options = {"lossless": True} if format_name == "WEBP" else {}
    found = decode(saved(noise(0), format_name, **options))
    assert np.array_equal(found.pixels, noise(0))
    assert found.notes == ()


def test_cmyk_jpegs_come_out_in_the_colours_that_went_in() -> None:
    """Pillow writes CMYK inverted with Adobe's mark, as Photoshop does; read plainly the picture would be a negative."""
    data = saved(Image.fromarray(quarters()).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data
    assert np.abs(decode(data).pixels.astype(int) - quarters()).max() <= 12


def test_ycck_jpegs_come_out_in_the_colours_that_went_in() -> None:
    """A CMYK file relabelled as YCCK (transform 2), whose first planes are the YCbCr of 255 less what is stored of CMY."""
    inverted = Image.fromarray(255 - quarters())  # stored is 255 - C = R, where K is 0
    planes = [*inverted.convert("YCbCr").split(), Image.new("L", inverted.size, 255)]  # stored K' = 255 - 0
    flipped = [plane.point(lambda v: 255 - v) for plane in planes]  # the writer inverts once more
    data = saved(Image.merge("CMYK", flipped), "JPEG", quality=100, subsampling=0)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    found = decode(data[:at] + b"\x02" + data[at + 1 :])
    assert np.abs(found.pixels.astype(int) - quarters()).max() <= 12


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(format_name: str) -> None:
    values = np.array([[0, 128, 129, 257], [32_768, 65_535, 65_407, 65_406]], np.uint16)
    found = decode(saved(Image.fromarray(values), format_name)).pixels
    wanted = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(found, np.repeat(wanted[..., None], 3, axis=2))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def test_16_bit_colour_png_keeps_its_colours() -> None:
    row = struct.pack(">3H", 0xFFFF, 0x8080, 0) + struct.pack(">3H", 0x0101, 0, 0xFEFE)
    assert decode(_png(2, 1, 16, 2, b"\0" + row)).pixels.tolist() == [[[255, 128, 0], [1, 0, 254]]]


def test_32_bit_and_float_pictures_are_refused_with_a_way_out() -> None:
    assert "save it as 8- or 16-bit" in refusal(saved(Image.fromarray(np.full((2, 2), 1 << 20, np.int32)), "TIFF"))
    assert "save it as 8-bit RGB" in refusal(saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


def test_transparent_pixels_lie_over_the_background() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 100, 0, 255)
    pixels[0, 1] = (200, 100, 0, 0)  # whatever colour an invisible pixel has must not be seen
    pixels[1, 0] = (0, 0, 0, 128)
    found = decode(saved(pixels)).pixels
    assert found[0, 0].tolist() == [200, 100, 0]
    assert tuple(found[0, 1]) == BACKGROUND
    assert np.abs(found[1, 0].astype(int) - 127).max() <= 1
    grey = np.array([[[7, 255], [7, 0]]], np.uint8)
    assert decode(saved(Image.fromarray(grey))).pixels[0].tolist() == [[7] * 3, [255] * 3]


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    assert decode(saved(palette)).pixels[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert decode(saved(palette, transparency=1)).pixels[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    half = decode(saved(palette, transparency=bytes([255, 0, 128]))).pixels[0]
    assert half[:2].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert np.abs(half[2].astype(int) - (127, 127, 255)).max() <= 1


def test_a_colour_key_is_transparent() -> None:
    key = _chunk(b"tRNS", struct.pack(">3H", 9, 9, 9))
    assert decode(_png(2, 1, 8, 2, b"\0" + bytes([9, 9, 9, 1, 2, 3]), key)).pixels[0].tolist() == [[255] * 3, [1, 2, 3]]
    key = _chunk(b"tRNS", struct.pack(">H", 9))
    assert decode(_png(2, 1, 8, 0, b"\0" + bytes([9, 5]), key)).pixels[0].tolist() == [[255] * 3, [5] * 3]


def test_one_bit_and_grey_pictures() -> None:
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert decode(saved(bits)).pixels[0].tolist() == [[0] * 3, [255] * 3]
    assert decode(saved(np.array([[3, 200]], np.uint8))).pixels[0].tolist() == [[3] * 3, [200] * 3]


@pytest.mark.parametrize("format_name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_that_is_said(format_name: str) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    options = {"lossless": True} if format_name == "WEBP" else {}
    found = decode(saved(first, format_name, save_all=True, append_images=[second], **options))
    assert (found.pixels == (255, 0, 0)).all()
    (note,) = found.notes
    assert "the first" in note
    assert decode(saved(first, "GIF")).notes == ()


def test_truncated_files_are_refused_in_every_format() -> None:
    for format_name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        data = saved(noise(1, 64, 64), format_name)
        for share in (0.3, 0.8):
            assert refusal(data[: int(len(data) * share)]).startswith("p: "), format_name
        assert refusal(data[: int(len(data) * 0.5)], at_least=8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damaged_files_are_decoded_or_refused_and_nothing_else(format_name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(noise(2, 20, 20), format_name, **({} if format_name in ("BMP", "GIF") else {"exif": exif}))
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        hurt = bytearray(data)
        for at in random.integers(0, len(data) if random.random() < 0.5 else 120, 3):
            hurt[at] ^= int(random.integers(1, 256))
        try:
            assert decode_picture(bytes(hurt), "p", max_pixels=1 << 20).pixels.shape[2] == 3
        except InvalidInput:
            refused += 1
    assert refused


def test_what_is_no_picture_is_said_to_be_none() -> None:
    assert "not a picture of a known format" in refusal(b"This is a text.")
    assert "an empty file" in refusal(b"")
    # Pillow would run an interpreter over the former and read the latter; neither is asked for.
    assert "not a picture" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    assert "not a picture" in refusal(saved(noise(0), "PPM"))


def test_size_is_judged_by_the_header() -> None:
    bomb = _png(60_000, 60_000, 8, 2, b"")
    assert "67108864 pixels" in refusal(bomb)
    assert "9000 x 9000" in refusal(_png(9000, 9000, 1, 0, b""))
    assert "24 x 16" in refusal(saved(noise(0, 16, 24)), max_pixels=383)
    assert decode(saved(noise(0)), max_pixels=384).width == 16


def test_a_reduced_jpeg_keeps_its_shorter_side_and_tells_its_own_size() -> None:
    data = saved(Image.fromarray(quarters(480, 640)), "JPEG", quality=95)
    for at_least, wanted in ((None, (640, 480)), (300, (640, 480)), (240, (320, 240)), (60, (80, 60)), (481, (640, 480))):
        found = decode(data, **({} if at_least is None else {"at_least": at_least}))
        assert (found.image.size, found.width, found.height) == (wanted, 640, 480)


@needs_data
def test_real_pictures_are_decoded_as_pillow_does() -> None:
    for path in sorted((DATA / "vision" / "pairs" / "images").glob("*.jpg"))[:8]:
        with Image.open(path) as image:
            assert np.array_equal(decode(path.read_bytes()).pixels, np.asarray(image.convert("RGB")))
    for path in sorted((DATA / "vision" / "emoji_pairs" / "images").glob("*.png"))[:20]:
        found = decode(path.read_bytes())
        assert tuple(found.pixels[0, 0]) == BACKGROUND
        assert found.format == "PNG"
