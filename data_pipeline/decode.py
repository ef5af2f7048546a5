"""Bytes to pixels: JPEG by libjpeg-turbo in strict mode, the rest by Pillow, all to (H, W, 3) RGB uint8.

Policy: EXIF orientation is applied; grey is repeated; CMYK is converted by Pillow; transparency is laid over
white, so that a wholly transparent picture is white; of more than 8 bits the upper 8 are kept, as the file
declares them and whatever values it has; of several frames or pages the first counts. Anything a decoder
would have to guess at is refused; slips that change no pixel aren't (module `jpeg`).
"""

from __future__ import annotations

import io
import warnings
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from data_pipeline.jpeg import tidied

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Guard against decompression bombs: larger pictures are refused before they are decoded."""

Image.MAX_IMAGE_PIXELS = None  # Pillow's own guard, which no `max_pixels` could raise

# Pillow's other formats include some that call programs or have a record of memory errors.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF", "JPEG2000")
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG"
# Tags of TIFF, and the compressions that deflate.
_BITS_PER_SAMPLE, _COMPRESSION, _STRIPS, _TILES = 258, 259, (273, 279), (324, 325)
_DEFLATED = (8, 32946)
_EXIF = b"Exif\0\0"  # anywhere in a JPEG: other blocks of any size may lie before it


class DecodeError(ValueError):
    """Bytes that aren't a whole picture of an accepted format; the message is the reason."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """(H, W, 3) uint8 RGB of a picture file. Raises `DecodeError`."""
    if data[:3] == _JPEG:
        return _decode_jpeg(data, max_pixels)
    return _decode_other(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int, slips: int = 4) -> Pixels:
    """As `decode`; up to `slips` slips of the encoder are forgiven, damage isn't."""
    try:
        return _strictly(data, max_pixels)
    except ValueError as error:
        reason = _reason(error)
    for tidy in tidied(data, reason) if slips else ():
        try:
            return _decode_jpeg(tidy, max_pixels, slips - 1)
        except DecodeError:
            continue
    raise DecodeError(reason)


def _strictly(data: bytes, max_pixels: int) -> Pixels:
    """A JPEG that gives a decoder nothing to warn of. Raises ValueError."""
    height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(height, width, max_pixels)
    if colour not in ("YCbCr", "RGB", "Gray"):
        simplejpeg.decode_jpeg(data, colorspace="CMYK", strict=True)  # Pillow would pass over damage
        return _decode_other(data, max_pixels)
    decoded: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    return _turned(decoded, _orientation(data)) if _EXIF in data else decoded


def _orientation(data: bytes) -> int:
    """What the EXIF block says, 1 where it says nothing that is known."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            turned = image.getexif().get(0x0112, 1)
    except Exception:
        return 1  # a broken EXIF block says nothing; the picture may still be whole
    return turned if turned in range(2, 9) else 1


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation of 1 to 8 (EXIF 2.3, tag 0x0112)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_other(data: bytes, max_pixels: int) -> Pixels:
    if data[:4] == _PNG:
        _check_png(data)  # Pillow makes up rows that are missing, and doesn't look at the pixels' checksums
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(image.height, image.width, max_pixels)
                if isinstance(image, TiffImageFile):
                    _check_tiff(data, image.tag_v2)
                image.load()
                return np.array(_rgb(ImageOps.exif_transpose(image), _bits(image)))
    except DecodeError:
        raise
    except UnidentifiedImageError:
        start = data[:8].hex(" ") or "nothing"
        raise DecodeError(f"not a picture of a known format (it starts with {start})") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise DecodeError(_reason(error)) from None


def _check_png(data: bytes) -> None:
    at = 8
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if kind == b"IEND":
            return
        if kind == b"IDAT" and zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise DecodeError("damaged: its pixels differ from their checksum")
        at = end + 4
    raise DecodeError("truncated: it has no end mark")


def _check_tiff(data: bytes, tags: Any) -> None:
    """Where pixels are deflated they have checksums, which Pillow doesn't look at."""
    if tags.get(_COMPRESSION) not in _DEFLATED:
        return
    for offsets, sizes in (_STRIPS, _TILES):
        for at, size in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=True):
            inflating, piece = zlib.decompressobj(), data[at : at + size]
            while piece and not inflating.eof:
                inflating.decompress(piece, 1 << 20)
                piece = inflating.unconsumed_tail
            if not inflating.eof:
                raise DecodeError("truncated: its pixels end early")


def _bits(image: Image.Image) -> int | None:
    """Of one grey value, as the file declares them; None for 8 and for those without a declared range."""
    if image.mode.startswith("I;16"):
        declared = image.tag_v2.get(_BITS_PER_SAMPLE, 16) if isinstance(image, TiffImageFile) else 16
        return int(np.min(declared))
    return 16 if image.mode == "I" and image.format in ("PPM", "PNG") else None  # the plugins scale to 16


def _rgb(image: Image.Image, bits: int | None) -> Image.Image:
    """`bits`: of one grey value where there are more than 8: the uppermost 8 are kept."""
    if bits is not None:
        image = Image.fromarray(
            (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        )
    elif image.mode.startswith("I") or image.mode == "F":
        raise DecodeError("grey values of 32 bits, whose black and white the file doesn't say; save 8 or 16")
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
