"""From the bytes of an image file to square RGB pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["decode_image", "fit_square"]

_MAX_PIXELS = 10**8
"""Larger ones are taken for decompression bombs."""


def decode_image(data: bytes, resolution: int) -> np.ndarray:
    """Decodes any format that Pillow reads: RGB, centre crop to a square, Lanczos to the resolution.

    The EXIF orientation is applied; of an animation the first frame is taken; transparency is laid on white; 16-bit
    grey (also as 32-bit integers up to 65535) is scaled to 8 bits; CMYK and other colour spaces are converted by
    Pillow's formulas; embedded colour profiles are not applied. Smaller images are enlarged.

    Args:
        data: content of the file.
        resolution: side R of the result in pixels.

    Returns:
        (R, R, 3), uint8, RGB.

    Raises:
        ValueError: not an image, damaged, above 10⁸ pixels, or with pixels that have no defined range. The text is
            the reason.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{image.width} × {image.height} pixels are too many for one picture")
            return fit_square(_rgb(ImageOps.exif_transpose(image)), resolution)
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(str(error) or type(error).__name__) from error


def fit_square(image: Image.Image, resolution: int) -> np.ndarray:
    """Centre crop to a square, Lanczos to the resolution; an image of the right size keeps its pixels.

    Args:
        image: RGB.
        resolution: side R of the result in pixels.

    Returns:
        (R, R, 3), uint8, RGB.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((resolution, resolution), Image.Resampling.LANCZOS))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels have no defined range")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        image = page
    return image.convert("RGB")
