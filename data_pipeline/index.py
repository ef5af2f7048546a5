"""Where every member of a shard lies: the compact binary sidecar of a tar.

Only what is there is stored: a set whose samples all have fields of their own takes no more room than others.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64, xxh3_64_intdigest

from configs.errors import DataError
from data_pipeline.books import Books
from data_pipeline.members import Member, Piece, Split, sparse_payload, walk

SUFFIX = ".idx"
FORMAT = 3  # of the sidecar. 2 had a cell for every field of every sample, there or not; it can still be read
_MAGIC = b"keelidx%d" % FORMAT
_DENSE = b"keelidx2"
# magic, shard bytes, samples, members, extents of sparse members, fields, bytes of names, bytes of keys
_HEADER = struct.Struct("<8s7Q")
_DENSE_HEADER = struct.Struct("<8sQQIII")  # magic, shard bytes, samples, fields, bytes of names, of keys
_SEAL = struct.Struct("<Q")  # XXH3-64 of all before it
_CELL = 28  # bytes for one member: offset, size, checksum, field
_DENSE_CELL = 24
_SAMPLE = 8  # bytes for one sample: end of its key, end of its members
_EXTENT = 32  # bytes for one extent: member, start, length, place
_ANEW = "make it anew with keel data index"

_CHUNK = 1 << 20

Extents = Mapping[int, Sequence[Piece]]
"""Member: its pieces; between them lie zeros."""


class Row(NamedTuple):
    """Where one sample's members lie, as plain numbers, in the order of the index's fields."""

    first: int  # number of the first member in the shard
    fields: list[int]  # numbers of fields
    offsets: list[int]
    sizes: list[int]
    checksums: list[int]


@dataclass(frozen=True)
class Index:
    """The members of one shard, sample after sample, those of a sample by field."""

    shard_bytes: int  # size of the shard file
    fields: tuple[str, ...]  # sorted
    field_of: npt.NDArray[np.uint32]  # (members,): number in `fields`
    offset: npt.NDArray[np.int64]  # (members,): first byte in the shard; of a sparse one, of its first piece
    size: npt.NDArray[np.int64]  # (members,): bytes of the payload
    checksum: npt.NDArray[np.uint64]  # (members,): XXH3-64 of the payload
    member_ends: npt.NDArray[np.uint32]  # (samples,): members up to the end of each sample
    key_ends: npt.NDArray[np.uint32]  # (samples,): end of each key in `key_text`
    key_text: bytes  # UTF-8 keys (any bytes, in fact), one after another
    extents: Extents = field(default_factory=dict)  # of sparse members

    def __len__(self) -> int:
        return len(self.key_ends)

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take."""
        return _CELL * len(self.offset) + _SAMPLE * len(self) + len(self.key_text)

    def key(self, sample: int) -> str:
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.key_text[start : int(self.key_ends[sample])].decode("utf-8", "surrogateescape")

    def keys(self) -> list[str]:
        return [self.key(sample) for sample in range(len(self))]

    def row(self, sample: int) -> Row:
        """One sample's members: indexing arrays one by one takes several times as long."""
        first, end = int(self.member_ends[sample - 1]) if sample else 0, int(self.member_ends[sample])
        return Row(
            first,
            self.field_of[first:end].tolist(),
            self.offset[first:end].tolist(),
            self.size[first:end].tolist(),
            self.checksum[first:end].tolist(),
        )

    def fields_of(self, sample: int) -> list[str]:
        """Names of the fields that a sample has, sorted."""
        return [self.fields[number] for number in self.row(sample).fields]

    def place(self, sample: int, name: str) -> tuple[int, int]:
        """First byte and size of a sample's field. Raises ValueError where it has none such."""
        row = self.row(sample)
        at = row.fields.index(self.fields.index(name))
        return row.offsets[at], row.sizes[at]

    @cached_property
    def sample_of(self) -> npt.NDArray[np.int64]:
        """(members,): the sample that each belongs to."""
        return np.searchsorted(self.member_ends, np.arange(len(self.offset)), side="right").astype(np.int64)

    def to_bytes(self) -> bytes:
        names = json.dumps(self.fields).encode()
        extents = np.array(
            [(member, *piece) for member, pieces in sorted(self.extents.items()) for piece in pieces], "<i8"
        ).reshape(-1, 4)
        head = _HEADER.pack(
            _MAGIC, self.shard_bytes, len(self), len(self.offset), len(extents), len(self.fields),
            len(names), len(self.key_text),
        )  # fmt: skip
        arrays = (
            self.offset.astype("<i8"), self.size.astype("<i8"), self.checksum.astype("<u8"),
            self.field_of.astype("<u4"), self.member_ends.astype("<u4"), self.key_ends.astype("<u4"), extents,
        )  # fmt: skip
        return sealed(b"".join([head, names, self.key_text, *(array.tobytes() for array in arrays)]))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Index:
        """Read a sidecar; raises `DataError` naming `source` unless every byte is as written."""
        magic = data[: len(_MAGIC)]
        header = _HEADER if magic == _MAGIC else _DENSE_HEADER
        if magic not in (_MAGIC, _DENSE) or len(data) < header.size + _SEAL.size:
            raise DataError(f"{source}: {_unknown(data)}; {_ANEW}")
        if data[-_SEAL.size :] != _SEAL.pack(xxh3_64_intdigest(memoryview(data)[: -_SEAL.size])):
            raise DataError(f"{source}: damaged shard index (checksum); {_ANEW}")
        index = _read(data) if magic == _MAGIC else _read_dense(data)
        if index is None:
            raise DataError(f"{source}: damaged shard index (length); {_ANEW}")
        if not index._plausible():
            raise DataError(f"{source}: damaged shard index (content); {_ANEW}")
        return index

    def _plausible(self) -> bool:
        """Whether every number can be used: no read outside the shard, no key outside the text."""
        named = all(isinstance(name, str) and name for name in self.fields)
        sparse = np.zeros(len(self.offset), bool)
        if not all(0 <= member < len(sparse) for member in self.extents):
            return False
        sparse[list(self.extents)] = True
        inside = (self.offset >= 0) & (self.size >= 0) & (self.offset <= self.shard_bytes)
        inside &= sparse | (self.offset <= self.shard_bytes - self.size)
        inside &= self.field_of < len(self.fields)
        pieces = all(
            start >= 0 and 0 <= length <= self.size[member] - start and 0 <= at <= self.shard_bytes - length
            for member, found in self.extents.items()
            for start, length, at in found
        )
        return bool(
            named
            and inside.all()
            and pieces
            and _rising(self.member_ends, len(self.offset))
            and _rising(self.key_ends, len(self.key_text))
        )


def _rising(ends: npt.NDArray[np.uint32], last: int) -> bool:
    steps = np.diff(ends.astype(np.int64), prepend=0)
    return bool((steps >= 0).all()) and (int(ends[-1]) if len(ends) else 0) == last


def _read(data: bytes) -> Index | None:
    """None where the lengths don't fit each other."""
    _, size, samples, members, pieces, fields, names_length, keys_length = _HEADER.unpack_from(data)
    arrays = _CELL * members + _SAMPLE * samples + _EXTENT * pieces
    if len(data) != _HEADER.size + names_length + keys_length + arrays + _SEAL.size:
        return None
    names, at = _names(data, _HEADER.size, names_length, fields)
    keys, at = data[at : at + keys_length], at + keys_length
    found = []
    for kind, count in (
        ("<i8", members), ("<i8", members), ("<u8", members), ("<u4", members),
        ("<u4", samples), ("<u4", samples),
    ):  # fmt: skip
        found.append(np.frombuffer(data, kind, count, at))
        at += found[-1].nbytes
    offset, sizes, checksum, field_of, member_ends, key_ends = found
    sparse: dict[int, list[Piece]] = {}
    for member, start, length, place in np.frombuffer(data, "<i8", 4 * pieces, at).reshape(-1, 4).tolist():
        sparse.setdefault(member, []).append((start, length, place))
    return Index(size, names, field_of, offset, sizes, checksum, member_ends, key_ends, keys, sparse)


def _read_dense(data: bytes) -> Index | None:
    """A sidecar of format 2: a cell for every field of every sample, with offset -1 where it isn't there."""
    _, size, samples, fields, names_length, keys_length = _DENSE_HEADER.unpack_from(data)
    cells = samples * fields
    head = _DENSE_HEADER.size + names_length + keys_length
    if len(data) != head + _DENSE_CELL * cells + 4 * samples + _SEAL.size:
        return None
    names, at = _names(data, _DENSE_HEADER.size, names_length, fields)
    keys, at = data[at : at + keys_length], at + keys_length
    offsets = np.frombuffer(data, "<i8", cells, at)
    sizes = np.frombuffer(data, "<i8", cells, at + 8 * cells)
    checksums = np.frombuffer(data, "<u8", cells, at + 16 * cells)
    key_ends = np.frombuffer(data, "<u4", samples, at + _DENSE_CELL * cells)
    there = offsets != -1
    field_of = np.nonzero(there.reshape(samples, fields))[1].astype(np.uint32)
    ends = np.cumsum(there.reshape(samples, fields).sum(1)).astype(np.uint32)
    return Index(size, names, field_of, offsets[there], sizes[there], checksums[there], ends, key_ends, keys)


def _names(data: bytes, at: int, length: int, count: int) -> tuple[tuple[str, ...], int]:
    """The fields' names, as many as there should be (else one that isn't plausible), and their end."""
    try:
        names = tuple(json.loads(data[at : at + length]))
    except (ValueError, TypeError, RecursionError):
        names = ()
    return (names if len(names) == count else ("",)), at + length


def sealed(body: bytes) -> bytes:
    """A sidecar's bytes with their checksum at the end."""
    return body + _SEAL.pack(xxh3_64_intdigest(body))


def _unknown(data: bytes) -> str:
    """What a file is that doesn't begin like a sidecar of a known format."""
    if data[:7] == _MAGIC[:7] and data[7:8].isdigit() and data[:8] not in (_MAGIC, _DENSE):
        return f"a shard index of format {data[7:8].decode()}, and this keel reads 2 and {FORMAT}"
    return "not a shard index"


@dataclass(frozen=True)
class Surveyed:
    """A tar, read once."""

    index: Index
    sha256: str  # of the whole file, in hex
    books: Books  # of its members
    again: tuple[str, ...] = ()  # members that begin a new sample of the same key: their field came before
    apart: tuple[str, ...] = ()  # keys of samples of which others lie between


def index_shard(path: Path) -> tuple[Index, str]:
    """The index of a tar shard and the SHA-256 of the whole file, in hex. Raises as `survey`."""
    found = survey(path)
    return found.index, found.sha256


def survey(path: Path, split: Split = "first") -> Surveyed:
    """Read a tar shard.

    Raises `DataError` for a file that is missing, not a plain tar, cut short, damaged, or without samples.
    """
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):  # a pipe would be waited for
            what = "a folder" if stat.S_ISDIR(kind) else "neither a file nor a folder"
            raise DataError(f"{path}: {what}, where a tar shard should be")
        with path.open("rb") as file:
            found = walk(file, path, split)
            if not found.members:
                raise DataError(
                    f"{path}: empty shard: no member is named KEY.FIELD{_left(found.books)}; remove it or "
                    "pack it again"
                )
            index, again, apart = _index(file, found.members)
            return Surveyed(index, _digest(file), found.books, again, apart)
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def fields_counted(index: Index, fields: Collection[str]) -> npt.NDArray[np.int64]:
    """(samples,): how many of `fields` each sample has."""
    wanted = [number for number, name in enumerate(index.fields) if name in fields]
    return np.bincount(index.sample_of[np.isin(index.field_of, wanted)], minlength=len(index)).astype(
        np.int64
    )


def _left(books: Books) -> str:
    told = "; ".join(books.lines())
    return f" ({told})" if told else ""


def _index(file: BinaryIO, members: Sequence[Member]) -> tuple[Index, tuple[str, ...], tuple[str, ...]]:
    fields = tuple(sorted({member.field for member in members}))
    column = {name: number for number, name in enumerate(fields)}
    keys: list[str] = []
    again: list[str] = []
    apart: list[str] = []
    known: set[str] = set()
    rows: list[tuple[int, int, int, int]] = []
    digests: list[int] = []
    seen: set[str] = set()
    for member in members:
        # webdataset gives up where a field comes again within a sample; two samples of one key lose nothing
        if not keys or member.key != keys[-1] or member.field in seen:
            if keys and member.key == keys[-1]:
                again.append(member.name)
            elif member.key in known:
                apart.append(member.key)
            known.add(member.key)
            keys.append(member.key)
            seen = set()
        seen.add(member.field)
        rows.append((len(keys) - 1, column[member.field], member.offset, member.size))
        digests.append(_payload_digest(file, member))
    sample, number, offset, size = np.array(rows, np.int64).T
    order = np.lexsort((number, sample))
    extents = {at: members[row].pieces for at, row in enumerate(order.tolist()) if members[row].pieces}
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    index = Index(
        shard_bytes=os.fstat(file.fileno()).st_size,
        fields=fields,
        field_of=number[order].astype(np.uint32),
        offset=offset[order],
        size=size[order],
        checksum=np.array(digests, np.uint64)[order],
        member_ends=np.cumsum(np.bincount(sample, minlength=len(keys))).astype(np.uint32),
        key_ends=np.cumsum([len(key) for key in encoded]).astype(np.uint32),
        key_text=b"".join(encoded),
        extents=extents,
    )
    return index, tuple(again), tuple(apart)


def _payload_digest(file: BinaryIO, member: Member) -> int:
    if member.pieces:
        try:
            return xxh3_64_intdigest(sparse_payload(file.fileno(), member.size, member.pieces))
        except ValueError as error:
            raise DataError(f"{file.name}: truncated shard: {error}") from None
    hasher, at, left = xxh3_64(), member.offset, member.size
    while left:
        piece = os.pread(file.fileno(), min(left, _CHUNK), at)
        if not piece:
            raise DataError(f"{file.name}: truncated shard: it shrank while it was read")
        hasher.update(piece)
        at, left = at + len(piece), left - len(piece)
    return hasher.intdigest()


def _digest(file: BinaryIO) -> str:
    file.seek(0, io.SEEK_SET)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
