"""Pixels of every kind of file, by one policy; anything damaged is refused with a reason."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import simplejpeg
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


# --- slips of encoders, and damage --------------------------------------------------------------------------


def scan_header(data: bytes, parameters: bytes) -> bytes:
    """The last scan header with other spectral parameters, as some phones' firmware writes them."""
    at = data.rindex(b"\xff\xda")
    place = at + 5 + 2 * data[at + 4]
    return data[:place] + parameters + data[place + 3 :]


def padded(data: bytes, padding: bytes) -> bytes:
    """Bytes between the last entropy-coded byte and the end mark."""
    return data[:-2] + padding + data[-2:]


def before_tables(data: bytes, junk: bytes) -> bytes:
    at = data.index(b"\xff\xdb")
    return data[:at] + junk + data[at:]


SLIPS = {
    "scan of zeros": lambda data: scan_header(data, b"\0\0\0"),
    "scan from 1": lambda data: scan_header(data, b"\1\5\x11"),
    "one zero": lambda data: padded(data, bytes(1)),
    "zeros": lambda data: padded(data, bytes(40)),
    "a page of zeros": lambda data: padded(data, bytes(4096)),
    "spaces": lambda data: padded(data, b" " * 9),
    "header": lambda data: before_tables(data, b"made by a camera"),
    "both": lambda data: padded(scan_header(before_tables(data, bytes(7)), b"\0\0\0"), bytes(20)),
    "revision": lambda data: data.replace(b"JFIF\0\1", b"JFIF\0\7"),
    "restarts": lambda data: re.sub(rb"(\xff[\xd0-\xd7\xd9])", bytes(12) + rb"\1", data),
    "behind the end": lambda data: data + bytes(100) + data,
}
KINDS = [{}, {"progressive": True}, {"optimize": True, "quality": 60}, {"restart_marker_blocks": 3}]


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_that_change_no_pixel_arent_damage(slip: str) -> None:
    for number, options in enumerate(KINDS):
        if "progressive" in options and slip in ("scan of zeros", "scan from 1", "both"):
            continue  # there the parameters have a meaning
        clean = encoded(photograph(70, 50, number), "JPEG", **{"quality": 92, **options})
        sloppy = SLIPS[slip](clean)
        assert sloppy != clean or slip in ("revision", "restarts")
        assert np.array_equal(decode(sloppy), decode(clean)), options
        assert np.abs(decode(sloppy).astype(int) - by_pillow(sloppy)).max() <= 2  # what every viewer shows


DAMAGES = {
    "zeros": lambda data, at: data[:at] + bytes(300) + data[at + 300 :],
    "hole": lambda data, at: data[:at] + data[at + 120 :],
    "inserted": lambda data, at: data[:at] + bytes(range(90, 150)) + data[at:],
    "moved": lambda data, at: data[:at] + data[at + 200 : at + 400] + data[at : at + 200] + data[at + 400 :],
    "flipped": lambda data, at: data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :],
    "cut": lambda data, at: data[:at] + data[-2:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("slip", ["scan of zeros", "zeros", "header"])
def test_a_slip_hides_no_damage(damage: str, slip: str) -> None:
    """What a strict decoder warns of is refused, whatever slips stand beside it."""
    refused = 0
    for options in (KINDS[0], KINDS[2]):
        clean = encoded(photograph(120, 160, 7), "JPEG", **{"quality": 85, **options})
        first = clean.rindex(b"\xff\xda") + 20
        for at in range(first, len(clean) - 500, 67):
            damaged = DAMAGES[damage](clean, at)
            try:
                simplejpeg.decode_jpeg(damaged, colorspace="RGB", strict=True)
            except ValueError:
                refused += 1
                with pytest.raises(DecodeError):
                    decode(SLIPS[slip](damaged))
    assert refused > 5


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_damage_is_refused_in_every_colour_space(mode: str) -> None:
    """All from 30 % on is zeros; in YCCK (Adobe's CMYK with a colour transform) too."""
    file = io.BytesIO()
    Image.fromarray(photograph(120, 160)).convert(mode).save(file, "JPEG", quality=90)
    whole = file.getvalue()
    variants = [whole]
    if mode == "CMYK":
        adobe = whole.index(b"Adobe\0")
        variants.append(whole[: adobe + 11] + b"\2" + whole[adobe + 12 :])
        assert simplejpeg.decode_jpeg_header(variants[1])[2] == "YCCK"
    for data in variants:
        assert decode(data).shape == (120, 160, 3)
        assert np.array_equal(decode(padded(data, bytes(50))), decode(data))
        at = int(len(data) * 0.3)
        for damaged in (
            data[:at] + bytes(len(data) - at),
            data[:at] + data[-2:],
            data[:at] + data[at + 200 :],
        ):
            with pytest.raises(DecodeError):
                decode(damaged)


def test_damaged_pngs_are_told_by_their_checksums() -> None:
    data = encoded(PHOTO)
    for at in range(data.index(b"IDAT") + 4, len(data) - 12, 701):
        for damaged in (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:at] + data[at + 5 :]):
            with pytest.raises(DecodeError):
                decode(damaged)
    end = data.index(b"IEND") - 4
    with pytest.raises(DecodeError):  # the last bytes of the pixels, without which the rows are still there
        decode(data[: end - 12] + bytes(8) + data[end - 4 :])
    with pytest.raises(DecodeError, match="no end mark"):
        decode(data[:end] + b"IEND")


def test_tiff_avif_and_jpeg_2000() -> None:
    for kind, options in (
        ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}), ("JPEG2000", {}),
    ):  # fmt: skip
        data = encoded(PHOTO, kind, **options)
        assert np.abs(decode(data).astype(int) - PHOTO).max() <= (3 if kind == "AVIF" else 0)
        with pytest.raises(DecodeError):
            decode(data[: len(data) // 2])
    deflated = encoded(PHOTO, "TIFF", compression="tiff_adobe_deflate")
    with pytest.raises(DecodeError):
        decode(deflated[:3000] + bytes(40) + deflated[3040:])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_deep_grey_keeps_its_upper_byte_whatever_values_it_has(kind: str) -> None:
    """One rule by what the file declares: no jump between sets, or within one, by the brightest pixel."""
    ramp = np.linspace(0, 1, 48 * 64).reshape(48, 64)
    for top in (65535, 4095, 256, 255, 1):
        values = (ramp * top).round().astype(np.uint16)
        seen = decode(encoded(values, kind))
        assert np.array_equal(seen[..., 0], values >> 8) and np.ptp(seen, axis=2).max() == 0


def test_twelve_bits_are_a_range_of_their_own_where_they_are_declared() -> None:
    """A TIFF of 12 bits a pixel, two pixels in three bytes, which Pillow reads but can't write."""
    values = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    pairs = values.reshape(-1, 2).astype(int)
    packed = b"".join(int((a << 12) | b).to_bytes(3, "big") for a, b in pairs.tolist())
    tags = [
        (256, 8),
        (257, 8),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 122),
        (277, 1),
        (278, 8),
        (279, len(packed)),
    ]
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags
    )
    data = b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little") + entries + bytes(4) + packed
    assert data.index(packed) == 122
    assert np.array_equal(decode(data)[..., 0], values >> 4)


@pytest.mark.parametrize("values", [np.zeros((4, 4), np.int32), np.zeros((4, 4), np.float32)])
def test_grey_without_a_declared_range_is_refused(values: np.ndarray) -> None:
    with pytest.raises(DecodeError, match="32 bits, whose black and white"):
        decode(encoded(values, "TIFF"))


def test_an_orientation_is_found_behind_any_number_of_other_blocks() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, block = encoded(PHOTO, "JPEG"), exif.tobytes()
    block = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    filler = b"\xff\xe2" + (40_002).to_bytes(2, "big") + b"x" * 40_000
    for blocks in (0, 2, 9):
        turned = decode(plain[:2] + filler * blocks + block + plain[2:])
        assert np.array_equal(turned, decode(plain).transpose(1, 0, 2)[:, ::-1])
