"""Any image file becomes square RGB pixels, or a reason why not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hflow_fast.data.decode import decode_image

RED, BLUE = (200, 30, 10), (10, 30, 200)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_an_image_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(pixels)), 8), pixels)


def test_the_crop_is_central_and_the_resize_lanczos():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8))
    expected = image.crop((6, 0, 26, 20)).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(decode_image(encode(image), 8), np.asarray(expected))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes(mode: str):
    image = Image.new("RGB", (5, 7), (255, 255, 255)).convert(mode)
    assert (decode_image(encode(image), 4) == 255).all()


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "BMP"), ("RGB", "WEBP"), ("RGB", "TIFF"), ("CMYK", "TIFF"), ("RGB", "PPM"), ("RGB", "TGA"), ("P", "GIF"),
     ("P", "PNG"), ("P", "PCX"), ("RGB", "SGI"), ("RGB", "DDS"), ("RGB", "JPEG2000")],
)
def test_colours_survive_every_format(mode: str, form: str):
    options = {"lossless": True} if form == "WEBP" else {}
    image = Image.new("RGB", (6, 6), RED)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    pixels = decode_image(encode(image, form, **options), 4)
    np.testing.assert_array_equal(pixels, np.broadcast_to(RED, (4, 4, 3)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(mode: str):
    image = Image.new("RGB", (16, 16), RED).convert(mode)
    expected = np.asarray(image.convert("RGB"), dtype=int)[0, 0]
    assert np.abs(decode_image(encode(image, "JPEG", quality=95), 4) - expected).max() <= 4


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (4, 4), (*RED, 128))
    expected = np.asarray(RED) * (128 / 255) + 127
    assert np.abs(decode_image(encode(half), 4) - expected).max() <= 1
    clear = Image.new("RGBA", (4, 4), (*RED, 0))
    assert (decode_image(encode(clear), 4) == 255).all()


def test_transparent_colour_of_a_palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *BLUE])
    np.testing.assert_array_equal(decode_image(encode(image), 4)[0, 0], BLUE)
    assert (decode_image(encode(image, transparency=1), 4) == 255).all()


def test_a_palette_with_an_opacity_per_colour():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *BLUE])
    pixels = decode_image(encode(image, transparency=bytes([255, 128])), 4)
    assert np.abs(pixels - (np.asarray(BLUE) * (128 / 255) + 127)).max() <= 1


def test_grey_with_transparency():
    pixels = decode_image(encode(Image.new("LA", (4, 4), (30, 128))), 4)
    assert np.abs(pixels - (30 * (128 / 255) + 127)).max() <= 1


def test_video_colours_are_converted():
    pixels = decode_image(encode(Image.new("RGB", (4, 4), RED).convert("YCbCr"), "TIFF"), 4)
    assert np.abs(pixels - np.asarray(RED)).max() <= 2


def test_sixteen_bit_colours_are_scaled_to_eight():
    values = np.array([[[0, 65535, 128 * 257], [257, 514, 771]]], dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_image(data, 1)[0, 0], [0, 255, 128])


def test_sixteen_bit_grey_of_either_byte_order():
    image = Image.frombytes("I;16B", (1, 1), struct.pack(">H", 128 * 257))
    assert (decode_image(encode(image, "TIFF"), 1) == 128).all()


def test_sixteen_bit_grey_is_scaled_to_eight():
    values = np.array([[0, 200], [128 * 257, 65535]], dtype=np.uint16)
    pixels = decode_image(encode(Image.fromarray(values)), 2)
    np.testing.assert_array_equal(pixels[..., 0], [[0, 1], [128, 255]])
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(values), "TIFF"), 2), pixels)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(values.astype(np.int32)), "TIFF"), 2), pixels)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form: str):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    np.testing.assert_array_equal(decode_image(data, 4)[0, 0], RED)


ORIENTATIONS = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, form: str):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    shown = decode_image(encode(Image.fromarray(pixels), form, exif=exif, **options), 4)
    np.testing.assert_array_equal(shown, ORIENTATIONS[orientation](pixels))


def test_one_pixel_fills_the_square():
    colour, grey = Image.new("RGB", (1, 1), RED), Image.new("L", (1, 1), 7)
    np.testing.assert_array_equal(decode_image(encode(colour), 8), np.broadcast_to(RED, (8, 8, 3)))
    np.testing.assert_array_equal(decode_image(encode(grey), 2), np.full((2, 2, 3), 7))


def chunk(kind: bytes, content: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png() -> bytes:
    """A few bytes that claim 12,000 × 12,000 pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_files() -> dict[str, tuple[bytes, str]]:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    png, jpeg = encode(Image.fromarray(noise)), encode(Image.fromarray(noise), "JPEG")
    corrupt = bytearray(png)
    corrupt[len(corrupt) // 2] ^= 0xFF
    return {
        "empty": (b"", "not an image"),
        "text": (b"no image at all", "not an image"),
        "truncated png": (png[: len(png) // 2], "truncated"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "header only": (png[:20], "Truncated"),
        "flipped bits": (bytes(corrupt), "broken"),
        "decompression bomb": (huge_png(), "too many"),
        "float": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        "large integers": (encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "32-bit"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", bad_files())
def test_a_bad_file_gives_its_reason(case: str):
    data, reason = bad_files()[case]
    with pytest.raises(ValueError, match=reason):
        decode_image(data, 8)
