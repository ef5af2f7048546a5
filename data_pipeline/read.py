"""Samples out of local shards: positioned reads by offset, every payload checked against its checksum.

Positioned reads, not memory maps: a map of a file that shrinks kills the process with SIGBUS.
"""

from __future__ import annotations

import errno
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xxhash import xxh3_64_intdigest

from configs.errors import DataError
from data_pipeline.index import Index, Row, split_name
from data_pipeline.manifest import Manifest

# Of what decode.py reads, each ending that such files have; what others packed keeps its name.
IMAGE_FIELDS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "jpe", "jfif", "pjpeg", "mpo", "apng", "pgm", "pbm"),
    *("pnm", "tif", "tiff", "avif", "avifs", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
)
LABEL_FIELDS = ("cls",)
CAPTION_FIELDS = ("txt", "json")

_SMALL = 16 * 1024  # bytes of a sample that is read at once
_OPEN_BYTES = 96 << 20  # of indexes kept in memory
_OPEN_FILES = 200
_RELOCATIONS = 5
_HUGE = 256 << 20  # bytes in one field beyond which it isn't read


def label_in(payload: bytes) -> int:
    """The class number that a label field holds. Raises ValueError that says what is wrong."""
    shown = payload[:40].decode(errors="replace").strip()
    if not shown.lstrip("-").isdecimal():
        raise ValueError(f"a label is a whole number, found {shown!r}")
    label = int(shown)
    if not 0 <= label < 1 << 31:
        raise ValueError(f"a label is a number from 0 to 2**31 - 1, found {label}")
    return label


class ShardError(DataError):
    """A whole shard can't be used: missing, truncated, changed, or out of reach."""


class SampleError(DataError):
    """One sample can't be used; the rest of its shard can."""

    def __init__(self, shard: str, key: str, field: str, reason: str):
        super().__init__(
            f"{shard}: sample {key!r}: field {field}: {reason}; mend it and pack the shard again, "
            "or have such samples replaced (data.max_broken)"
        )
        self.shard, self.key, self.field, self.reason = shard, key, field, reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str, str]]:
        return SampleError, (self.shard, self.key, self.field, self.reason)


@dataclass
class _Open:
    index: Index
    descriptor: int
    path: Path
    _columns: dict[tuple[str, ...], list[int]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return 24 * self.index.offsets.size + len(self.index.key_text)

    def columns(self, names: Sequence[str]) -> list[int]:
        """Where the fields `names` stand in the index, as far as the shard has them."""
        found = self._columns.get(tuple(names))
        if found is None:
            fields = self.index.fields
            found = self._columns[tuple(names)] = [fields.index(name) for name in names if name in fields]
        return found


class Reader:
    """Reads samples of one manifest by (shard, sample). Holds a bounded number of open shards.

    `locate` gives the local path of a shard; the default is the manifest's own.
    """

    def __init__(self, manifest: Manifest, locate: Callable[[int], Path] | None = None):
        self.manifest = manifest
        self._locate = locate or manifest.shard_path
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._bytes = 0

    def read(
        self, shard: int, sample: int, wanted: Sequence[Sequence[str]], also: Sequence[str] = ()
    ) -> list[tuple[str, bytes]]:
        """For each list of alternatives (`IMAGE_FIELDS`, ...): the field the sample has, and its bytes.

        Behind them all fields of `also` that the sample has. Raises `ShardError`, or `SampleError` where a
        field is missing, too large or not as indexed.
        """
        opened = self._opened(shard)
        row = opened.index.row(sample)
        columns = [self._column(shard, opened, sample, row, names) for names in wanted]
        for column in opened.columns(also):
            if row.offsets[column] >= 0:
                columns.append(self._column(shard, opened, sample, row, (opened.index.fields[column],)))
        return self._payloads(shard, opened, sample, row, columns)

    def key(self, shard: int, sample: int) -> str:
        return self._opened(shard).index.key(sample)

    def will_read(self, shard: int, sample: int) -> None:
        """Ask the system to fetch a sample's pages now."""
        opened = self._opened(shard)
        offsets, sizes, _ = opened.index.row(sample)
        start = max(0, min(offsets))
        os.posix_fadvise(opened.descriptor, start, max(offsets) - start + max(sizes), os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for opened in self._open.values():
            os.close(opened.descriptor)
        self._open.clear()
        self._bytes = 0

    def _column(self, shard: int, opened: _Open, sample: int, row: Row, names: Sequence[str]) -> int:
        fields = opened.index.fields
        for column in opened.columns(names):
            if row.offsets[column] >= 0:
                if row.sizes[column] > _HUGE:
                    raise self._error(shard, sample, fields[column], f"larger than {_HUGE >> 20} MiB")
                return column
        has = [field for field, at in zip(fields, row.offsets, strict=True) if at >= 0]
        raise self._error(shard, sample, "/".join(names), f"missing; the sample has {', '.join(has)}")

    def _payloads(
        self, shard: int, opened: _Open, sample: int, row: Row, columns: Sequence[int]
    ) -> list[tuple[str, bytes]]:
        """Names and bytes. Small samples by one read; of large ones a copy costs more than a call."""
        if not columns:
            return []
        offsets, sizes, checksums = row
        start = min([offsets[column] for column in columns])
        end = max([offsets[column] + sizes[column] for column in columns])
        together = len(columns) > 1 and end - start <= _SMALL
        whole = self._pread(shard, opened, start, end - start) if together else b""
        found, fields = [], opened.index.fields
        for column in columns:
            at, size = offsets[column], sizes[column]
            data = whole[at - start : at - start + size] if together else self._pread(shard, opened, at, size)
            if xxh3_64_intdigest(data) != checksums[column]:
                raise self._mismatch(shard, opened, sample, column)
            found.append((fields[column], data))
        return found

    def _pread(self, shard: int, opened: _Open, start: int, size: int) -> bytes:
        try:
            data = os.pread(opened.descriptor, size, start)
            while len(data) < size:  # a read may be short on some file systems
                more = os.pread(opened.descriptor, size - len(data), start + len(data))
                if not more:
                    raise ShardError(
                        f"{opened.path}: truncated shard: {os.fstat(opened.descriptor).st_size} bytes, the "
                        f"manifest says {opened.index.shard_bytes}; fetch or pack it again"
                    )
                data += more
        except OSError as error:
            self._drop(shard)
            raise ShardError(_unreadable(opened.path, error)) from error
        return data

    def _mismatch(self, shard: int, opened: _Open, sample: int, column: int) -> DataError:
        """One damaged payload, or another shard in this one's place? The tar header before it tells."""
        index = opened.index
        header = self._pread(
            shard, opened, int(index.offsets[sample, column]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE
        )
        try:
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            same = split_name(found.name) == (index.key(sample), index.fields[column])
            same = same and found.size == index.sizes[sample, column]
        except tarfile.TarError:
            same = True
        # A name of over 100 bytes is in an extended header: then only the end of it can be compared.
        if not same and len(index.key(sample)) < 95:
            return ShardError(
                f"{opened.path}: changed shard: it isn't the one the manifest describes; "
                "make the manifest anew with keel data index, or put the old shard back"
            )
        return self._error(shard, sample, index.fields[column], "payload differs from its checksum: damaged")

    def _error(self, shard: int, sample: int, field: str, reason: str) -> SampleError:
        return SampleError(self.manifest.shards[shard].name, self.key(shard, sample), field, reason)

    def _opened(self, shard: int) -> _Open:
        opened = self._open.get(shard)
        if opened is None:
            index = self.manifest.index(shard)
            opened = self._fetched_and_opened(shard, index)
            self._open[shard] = opened
            self._bytes += opened.bytes
            while len(self._open) > 1 and (len(self._open) > _OPEN_FILES or self._bytes > _OPEN_BYTES):
                self._drop(next(iter(self._open)))
        else:
            self._open.move_to_end(shard)
        return opened

    def _fetched_and_opened(self, shard: int, index: Index) -> _Open:
        """A remote shard's copy may be evicted between being located and being opened: then once more."""
        for attempt in range(_RELOCATIONS):
            path = self._locate(shard)
            try:
                return _Open(index, open_shard(path, index.shard_bytes), path)
            except ShardError:
                if not self.manifest.shards[shard].remote or attempt == _RELOCATIONS - 1:
                    raise
        raise AssertionError

    def _drop(self, shard: int) -> None:
        opened = self._open.pop(shard, None)
        if opened is not None:
            self._bytes -= opened.bytes
            os.close(opened.descriptor)


def open_shard(path: Path, size: int) -> int:
    """A descriptor of a shard of exactly `size` bytes; raises `ShardError` that says what is wrong."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(_unreadable(path, error)) from error
    found = os.fstat(descriptor).st_size
    if found == size:
        return descriptor
    os.close(descriptor)
    if found < size:
        raise ShardError(
            f"{path}: truncated shard: {found} bytes, the manifest says {size}; fetch or pack it again"
        )
    raise ShardError(
        f"{path}: changed shard: {found} bytes, the manifest says {size}; "
        "make the manifest anew with keel data index, or put the old shard back"
    )


def _unreadable(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT and path.parent.exists():
        return f"{path}: missing shard: the manifest names it; put it back or make the manifest anew"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN, errno.EIO, errno.ENODEV):
        return f"{path}: its file system is out of reach ({error.strerror}): is it still mounted?"
    return f"{path}: can't be read: {error.strerror or error}"
