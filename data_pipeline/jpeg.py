"""Slips in JPEG files that leave every pixel as it was: the file as a careful encoder would have written it.

libjpeg has one list of warnings for slips and for damage, and tells only the first of a file. So a slip is
taken out of the bytes, and what remains has to be decoded without any warning. What is taken out:

- bytes between whole segments of the header, which decoders skip;
- padding behind a scan: zeros, or one byte over and over. Entropy-coded data don't end so, their last byte is
  filled with ones (ITU-T T.81, F.1.2.3). Other bytes behind a scan are what damage leaves there;
- a scan header of a sequential file with the parameters of a progressive one, which have no meaning there;
- a revision of JFIF that doesn't exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_EXTRANEOUS = re.compile(r"extraneous bytes before marker 0x([0-9a-f]{2})$")
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SEQUENTIAL, _JFIF, _SCAN, _END = (0xC0, 0xC1), 0xE0, 0xDA, 0xD9
_RESTARTS = range(0xD0, 0xD8)
_PADDING = 4  # bytes of one value other than zero that are padding for certain

_Part = tuple[int, bytes]  # marker code, 0 for what lies between segments; all bytes of it


def tidied(data: bytes, warning: str) -> Iterator[bytes]:
    """Files to be decoded in place of `data`, the likeliest first; none where `warning` tells of damage.

    `warning`: what libjpeg said first.
    """
    extraneous = _EXTRANEOUS.search(warning)
    if extraneous:
        parts, wanted = _parts(data), int(extraneous[1], 16)
        for spared in (0, 1):  # a scan may end with the byte that is its padding
            tidy = [_without(parts, number, wanted, spared) for number in range(len(parts))]
            if tidy != [part for _, part in parts]:
                yield data[:2] + b"".join(tidy)
    elif "Invalid SOS parameters for sequential" in warning or "unknown JFIF revision" in warning:
        parts = _parts(data)
        if parts:
            sequential = any(code in _SEQUENTIAL for code, _ in parts)
            yield data[:2] + b"".join(_corrected(code, part, sequential) for code, part in parts)


def _parts(data: bytes) -> list[_Part]:
    """What follows the start mark, up to the end mark; empty where there is no end to be found."""
    parts: list[_Part] = []
    at = 2
    while found := _MARKER.search(data, at):
        if found.start() > at:
            parts.append((0, data[at : found.start()]))
        code, at = found[1][0], found.end()
        if code not in _RESTARTS and code != _END:
            length = int.from_bytes(data[at : at + 2], "big")
            if length < 2 or at + length > len(data):
                return []
            at += length
        parts.append((code, b"\xff" + data[found.end() - 1 : at]))
        if code == _END:
            return parts
    return []


def _without(parts: list[_Part], number: int, wanted: int, spared: int) -> bytes:
    """A part less the extraneous bytes that end before a marker of the `wanted` kind, if it has any."""
    code, part = parts[number]
    following = parts[number + 1][0] if number + 1 < len(parts) else wanted
    alike = following == wanted or (following in _RESTARTS and wanted in _RESTARTS)
    if code or not alike:
        return part
    if not number or parts[number - 1][0] not in (_SCAN, *_RESTARTS):
        return b""
    run = len(part) - len(part.rstrip(part[-1:]))
    if part[-1] == 0 and part[: len(part) - run].endswith(b"\xff"):
        run -= 1  # this zero says that the byte before it is no marker
    enough = 1 if part[-1] == 0 else _PADDING
    return part[: len(part) - run + spared] if run >= enough else part


def _corrected(code: int, part: bytes, sequential: bool) -> bytes:
    if code == _SCAN and sequential:
        return part[:-3] + b"\x00\x3f\x00"
    if code == _JFIF and part[4:9] == b"JFIF\0":
        return part[:9] + b"\x01\x02" + part[11:]
    return part
