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
from operator import add
from pathlib import Path

from xxhash import xxh3_64_intdigest

from configs.errors import DataError
from data_pipeline import fields
from data_pipeline.account import some
from data_pipeline.index import Index, Row
from data_pipeline.manifest import Manifest
from data_pipeline.members import MOST_SPARSE, sparse_payload, split_name

IMAGE_FIELDS = fields.IMAGE_FIELDS
LABEL_FIELDS = fields.LABEL_FIELDS
CAPTION_FIELDS = fields.CAPTION_FIELDS

_SMALL = 16 * 1024  # bytes of a sample that is read at once
_OPEN_BYTES = 96 << 20  # of indexes kept in memory
_OPEN_FILES = 200
_RELOCATIONS = 5
_HUGE = MOST_SPARSE  # bytes in one field beyond which it isn't read
_APART = 4 << 20  # bytes between a sample's members that aren't worth reading ahead
_WITNESSES = 5  # other samples that tell a damaged payload from a changed shard


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
        choose = "choose another by keel data index --picture-field or --label-field, "
        super().__init__(
            f"{shard}: sample {key!r}: field {field}: {reason}; "
            f"{choose if reason.startswith('missing') else ''}mend it and pack the shard again, "
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
        return self.index.nbytes

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
        for number in opened.columns(also):
            if number in row.fields:
                columns.append(self._column(shard, opened, sample, row, (opened.index.fields[number],)))
        return self._payloads(shard, opened, sample, row, columns)

    def key(self, shard: int, sample: int) -> str:
        return self._opened(shard).index.key(sample)

    def will_read(self, shard: int, sample: int) -> None:
        """Ask the system to fetch a sample's pages now."""
        opened = self._opened(shard)
        row = opened.index.row(sample)
        if not row.offsets:
            return
        start, end = min(row.offsets), max(map(add, row.offsets, row.sizes))
        end = min(end, opened.index.shard_bytes)  # a sparse member is longer than what is stored of it
        if end - start <= _APART + sum(row.sizes):
            os.posix_fadvise(opened.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
            return
        for at, size in zip(row.offsets, row.sizes, strict=True):  # a link may lead far away
            size = min(size, opened.index.shard_bytes - at)
            os.posix_fadvise(opened.descriptor, at, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for opened in self._open.values():
            os.close(opened.descriptor)
        self._open.clear()
        self._bytes = 0

    def _column(self, shard: int, opened: _Open, sample: int, row: Row, names: Sequence[str]) -> int:
        """Where in `row` the first of the fields `names` stands that the sample has."""
        for number in opened.columns(names):
            if number in row.fields:
                column = row.fields.index(number)
                if row.sizes[column] > _HUGE:
                    name = opened.index.fields[number]
                    raise self._error(shard, sample, name, f"larger than {_HUGE >> 20} MiB")
                return column
        has = some(opened.index.fields_of(sample)) or "none"
        raise self._error(shard, sample, some(names), f"missing; the sample has {has}")

    def _payloads(
        self, shard: int, opened: _Open, sample: int, row: Row, columns: Sequence[int]
    ) -> list[tuple[str, bytes]]:
        """Names and bytes. Small samples by one read; of large ones a copy costs more than a call."""
        if not columns:
            return []
        first, numbers, offsets, sizes, checksums = row
        start = min([offsets[column] for column in columns])
        end = max([offsets[column] + sizes[column] for column in columns])
        together = len(columns) > 1 and end - start <= _SMALL
        whole = self._pread(shard, opened, start, end - start) if together else b""
        found, names, sparse = [], opened.index.fields, opened.index.extents
        for column in columns:
            at, size = offsets[column], sizes[column]
            if sparse and first + column in sparse:
                data = self._sparse(shard, opened, first + column, size)
            elif together:
                data = whole[at - start : at - start + size]
            else:
                data = self._pread(shard, opened, at, size)
            if xxh3_64_intdigest(data) != checksums[column]:
                raise self._mismatch(shard, opened, sample, row, column)
            found.append((names[numbers[column]], data))
        return found

    def _sparse(self, shard: int, opened: _Open, member: int, size: int) -> bytes:
        try:
            return sparse_payload(opened.descriptor, size, opened.index.extents[member])
        except ValueError:
            raise self._shrunk(opened) from None
        except OSError as error:
            self._drop(shard)
            raise ShardError(_unreadable(opened.path, error)) from error

    def _pread(self, shard: int, opened: _Open, start: int, size: int) -> bytes:
        try:
            data = os.pread(opened.descriptor, size, start)
            while len(data) < size:  # a read may be short on some file systems
                more = os.pread(opened.descriptor, size - len(data), start + len(data))
                if not more:
                    raise self._shrunk(opened)
                data += more
        except OSError as error:
            self._drop(shard)
            raise ShardError(_unreadable(opened.path, error)) from error
        return data

    def _shrunk(self, opened: _Open) -> ShardError:
        return ShardError(
            f"{opened.path}: truncated shard: {os.fstat(opened.descriptor).st_size} bytes, the "
            f"manifest says {opened.index.shard_bytes}; fetch or pack it again"
        )

    def _mismatch(self, shard: int, opened: _Open, sample: int, row: Row, column: int) -> DataError:
        """One damaged payload, or another shard in this one's place?

        The tar header before the payload tells where it has the member's whole name; what it has of a long
        one, of a link's or of a sparse member's depends on the tar's writer. Then other samples tell.
        """
        name = opened.index.fields[row.fields[column]]
        if not self._named(shard, opened, sample, name, row, column) and self._all_differ(opened, sample):
            return ShardError(
                f"{opened.path}: changed shard: it isn't the one the manifest describes; "
                "make the manifest anew with keel data index, or put the old shard back"
            )
        return self._error(shard, sample, name, "payload differs from its checksum: damaged")

    def _named(self, shard: int, opened: _Open, sample: int, name: str, row: Row, column: int) -> bool:
        """Whether the header before a payload has its sample's key, its field and its size."""
        at = row.offsets[column] - tarfile.BLOCKSIZE
        if at < 0:
            return False
        header = self._pread(shard, opened, at, tarfile.BLOCKSIZE)
        try:
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError):
            return False
        split = split_name(found.name, self.manifest.split)
        return split == (opened.index.key(sample), name) and found.size == row.sizes[column]

    def _all_differ(self, opened: _Open, sample: int) -> bool:
        """Whether the largest payloads of other samples, over the whole shard, aren't as indexed either."""
        compared, others = False, [n for n in range(len(opened.index)) if n != sample]
        for other in others[:: max(1, len(others) // _WITNESSES)]:
            row = opened.index.row(other)
            if not row.sizes:
                continue
            column = row.sizes.index(max(row.sizes))
            if row.sizes[column] > _HUGE or row.first + column in opened.index.extents:
                continue
            data = os.pread(opened.descriptor, row.sizes[column], row.offsets[column])
            if xxh3_64_intdigest(data) == row.checksums[column]:
                return False
            compared = True
        return compared

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
