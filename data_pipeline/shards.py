"""webdataset's tar writer and reader: the only module that knows the library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import webdataset

from configs.errors import DataError
from data_pipeline.files import published


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, field -> bytes) samples as one tar; gives their number.

    The same samples give the same bytes: no time, user or order of a mapping enters. The file is whole or
    absent.
    """
    with published(path) as file:
        return write_samples(file, samples)


def write_samples(file: BinaryIO, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    count = 0
    with webdataset.TarWriter(file, encoder=False, mtime=0, user="keel", group="keel") as writer:
        for key, fields in samples:
            check_key(key)
            writer.write({"__key__": key, **fields})
            count += 1
    return count


def check_key(key: str) -> None:
    """Raise `DataError` unless webdataset would read `key` back as it is, from a USTAR header."""
    last = key.rpartition("/")[2]
    if not last or "." in last or key.startswith("/") or len(key.encode()) > 80:
        raise DataError(
            f"{key!r} can't be a sample's key: at most 80 bytes, no dot in the last part, not empty"
        )
