"""Bytes to pixels: JPEG by libjpeg-turbo in strict mode, the rest by Pillow, all to (H, W, 3) RGB uint8.

Policy: EXIF orientation is applied; grey is repeated; CMYK is converted by Pillow; transparency is laid over
white; 16-bit grey keeps its upper byte. Anything a decoder would have to guess at is refused.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Guard against decompression bombs: larger pictures are refused before they are decoded."""

Image.MAX_IMAGE_PIXELS = None  # Pillow's own guard, which no `max_pixels` could raise

# Pillow's other formats include some that call programs or have a record of memory errors.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF", "JPEG2000")
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG"
_HEAD = 65_536  # bytes in which an EXIF block of a JPEG lies


class DecodeError(ValueError):
    """Bytes that aren't a whole picture of an accepted format; the message is the reason."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """(H, W, 3) uint8 RGB of a picture file. Raises `DecodeError`."""
    if data[:3] == _JPEG:
        return _decode_jpeg(data, max_pixels)
    return _decode_other(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise DecodeError(_reason(error)) from None
    _check_size(height, width, max_pixels)
    if colour not in ("YCbCr", "RGB", "Gray") or b"Exif\0\0" in data[:_HEAD]:
        pixels = _check_strictly_then_pillow(data, max_pixels, colour)
        if pixels is not None:
            return pixels
    try:
        decoded: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        raise DecodeError(_reason(error)) from None
    return decoded


def _check_strictly_then_pillow(data: bytes, max_pixels: int, colour: str) -> Pixels | None:
    """Pictures that need Pillow for their colours or orientation; None where the fast path will do."""
    if colour in ("YCbCr", "RGB", "Gray"):
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                turned = image.getexif().get(0x0112, 1)
        except Exception:
            turned = 1  # a broken EXIF block says nothing; the picture may still be whole
        if turned not in range(2, 9):
            return None
        try:
            upright: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError as error:
            raise DecodeError(_reason(error)) from None
        return _turned(upright, turned)
    return _decode_other(data, max_pixels)


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation of 2 to 8 (EXIF 2.3, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_other(data: bytes, max_pixels: int) -> Pixels:
    if data[:4] == _PNG and b"IEND" not in data:
        raise DecodeError("truncated: it has no end mark")  # Pillow makes up rows that are missing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(image.height, image.width, max_pixels)
                image.load()
                return np.array(_rgb(ImageOps.exif_transpose(image)))
    except DecodeError:
        raise
    except UnidentifiedImageError:
        start = data[:8].hex(" ") or "nothing"
        raise DecodeError(f"not a picture of a known format (it starts with {start})") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise DecodeError(_reason(error)) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values >> (8 if values.max(initial=0) > 255 else 0)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise DecodeError(f"a picture of {width}x{height} pixels")
    if height * width > max_pixels:
        raise DecodeError(f"{width}x{height} pixels are more than the {max_pixels} allowed")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
