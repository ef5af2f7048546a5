"""Tars with links, holes and odd names, for tests."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

Entry = tuple[str, bytes | str]
"""Name, and a payload; or "folder", "fifo", "hard TARGET", "soft TARGET", "type X"."""


def tarred(path: Path, entries: Iterable[Entry], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of `entries`; names may hold any bytes, as `os.fsdecode` gives them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, what in entries:
            info = tarfile.TarInfo(name)
            data = what if isinstance(what, bytes) else b""
            info.size = len(data)
            if isinstance(what, str):
                kind, _, target = what.partition(" ")
                info.linkname = target if kind in ("hard", "soft") else ""
                info.type = {
                    "folder": tarfile.DIRTYPE, "fifo": tarfile.FIFOTYPE, "hard": tarfile.LNKTYPE,
                    "soft": tarfile.SYMTYPE, "type": os.fsencode(target),
                }[kind]  # fmt: skip
            tar.addfile(info, io.BytesIO(data))
    return path


def sparse(payload: bytes, name: str = "x.jpg", hole: int = 4096) -> bytes:
    """Header and data of a member as GNU tar -S writes it: holes of zeros left out, map in the header."""
    found = [
        (at, payload[at : at + hole])
        for at in range(0, len(payload), hole)
        if payload[at : at + hole].strip(b"\0")
    ]
    assert len(found) <= 3
    pieces = [(at, len(piece)) for at, piece in found] + [(len(payload), 0)]
    stored = b"".join(piece for _, piece in found)
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[100:108], header[108:116], header[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    header[124:136], header[136:148] = b"%011o\0" % len(stored), b"00000000000\0"
    header[156:157], header[257:265] = b"S", b"ustar  \0"
    for number, (at, length) in enumerate(pieces):
        header[386 + 24 * number : 410 + 24 * number] = b"%011o\0%011o\0" % (at, length)
    header[483:495] = b"%011o\0" % len(payload)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + stored + bytes(-len(stored) % 512)


def with_sparse(path: Path, payload: bytes, name: str = "x.jpg") -> Path:
    """A sparse member put before the end of a tar."""
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end] + sparse(payload, name) + bytes(10240))
    return path
