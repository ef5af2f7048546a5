"""Pixels of every kind of file, by one policy; anything damaged is refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import DecodeError, decode
from tests.data_pipeline.sets import encoded, photograph

PHOTO = photograph(60, 90)


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM"])
def test_lossless_formats(kind: str) -> None:
    assert np.array_equal(decode(encoded(PHOTO, kind)), PHOTO)


def test_webp_and_gif() -> None:
    for data in (encoded(PHOTO, "WEBP", quality=90), encoded(PHOTO, "GIF")):
        assert np.array_equal(decode(data), by_pillow(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}, {"quality": 30}])
def test_jpeg_is_pillows_within_rounding(options: dict[str, object]) -> None:
    data = encoded(PHOTO, "JPEG", **{"quality": 92, **options})
    assert np.abs(decode(data).astype(int) - by_pillow(data)).max() <= 2


def test_grey_cmyk_palette_and_sixteen_bits() -> None:
    grey = encoded(PHOTO[..., 0], "JPEG")
    assert decode(grey).shape == (60, 90, 3) and np.ptp(decode(grey), axis=2).max() == 0
    cmyk = io.BytesIO()
    Image.fromarray(PHOTO).convert("CMYK").save(cmyk, "JPEG", quality=95)
    assert np.abs(decode(cmyk.getvalue()).astype(int) - PHOTO).mean() < 12
    palette = io.BytesIO()
    Image.fromarray(PHOTO).quantize(64).save(palette, "PNG")
    assert np.array_equal(decode(palette.getvalue()), by_pillow(palette.getvalue()))
    deep = encoded(PHOTO[..., 0].astype(np.uint16) * 257, "PNG")
    assert np.array_equal(decode(deep)[..., 1], PHOTO[..., 0])


def test_transparency_lies_over_white() -> None:
    clear = np.dstack([PHOTO, np.zeros((60, 90), np.uint8)])
    assert (decode(encoded(clear)) == 255).all()
    solid = np.dstack([PHOTO, np.full((60, 90), 255, np.uint8)])
    assert np.array_equal(decode(encoded(solid)), PHOTO)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PHOTO, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 95}))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(decode(data).astype(int) - upright).max() <= 2


def test_a_broken_exif_block_doesnt_spoil_the_picture() -> None:
    plain = encoded(PHOTO, "JPEG")
    block = b"Exif\0\0" + bytes(range(40))
    data = plain[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + plain[2:]
    assert np.array_equal(decode(data), decode(plain))


JPEG = encoded(PHOTO, "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"GIF89a", b"not a picture at all", JPEG[:200], JPEG[: len(JPEG) // 2], JPEG[:-20],
        JPEG[:1200] + bytes(400) + JPEG[1600:], encoded(PHOTO)[:-200], encoded(PHOTO, "WEBP")[:300],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"II*\0" + bytes(100),
    ],
    ids=range(11),
)  # fmt: skip
def test_what_isnt_a_whole_picture_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(data)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_bombs_are_refused_before_they_are_decoded() -> None:
    bomb = encoded(np.zeros((3000, 4000, 3), np.uint8))
    for data in (bomb, encoded(np.zeros((3000, 4000, 3), np.uint8), "JPEG")):
        with pytest.raises(DecodeError, match="4000x3000 pixels are more than the 10000000 allowed"):
            decode(data, max_pixels=10_000_000)
