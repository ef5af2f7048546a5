"""Where every member of a shard lies: one strict pass over a tar, kept as a compact binary sidecar.

A plain tar reader stops without a word at a damaged header; this one accounts for every byte of the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64, xxh3_64_intdigest

from configs.errors import DataError

SUFFIX = ".idx"
FORMAT = 2  # of the sidecar; 1 had CRC-32, which takes as long to compute as the payload to read
_MAGIC = b"keelidx%d" % FORMAT
_HEADER = struct.Struct("<8sQQIII")  # magic, shard bytes, samples, fields, bytes of names, bytes of keys
_SEAL = struct.Struct("<Q")  # XXH3-64 of all before it
_CELL = 24  # bytes for one member: offset, size, checksum
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20


class Row(NamedTuple):
    """Where one sample's fields lie; in the order of the index's fields."""

    offsets: list[int]
    sizes: list[int]
    checksums: list[int]


@dataclass(frozen=True)
class Index:
    """The members of one shard, by sample and field. A field that a sample lacks has offset -1."""

    shard_bytes: int  # size of the shard file
    fields: tuple[str, ...]
    offsets: npt.NDArray[np.int64]  # (samples, fields): first byte in the shard
    sizes: npt.NDArray[np.int64]  # (samples, fields)
    checksums: npt.NDArray[np.uint64]  # (samples, fields): XXH3-64 of the payload
    key_ends: npt.NDArray[np.uint32]  # (samples,): end of each key in `key_text`
    key_text: bytes  # UTF-8 keys, one after another

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, sample: int) -> str:
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.key_text[start : int(self.key_ends[sample])].decode("utf-8", "surrogateescape")

    def row(self, sample: int) -> Row:
        """One sample's members as plain numbers: indexing arrays one by one takes several times as long."""
        return Row(
            self.offsets[sample].tolist(), self.sizes[sample].tolist(), self.checksums[sample].tolist()
        )

    def keys(self) -> list[str]:
        return [self.key(sample) for sample in range(len(self))]

    def column(self, names: Sequence[str]) -> int | None:
        """The first of the fields `names` that this shard has."""
        return next((self.fields.index(name) for name in names if name in self.fields), None)

    def to_bytes(self) -> bytes:
        names = json.dumps(self.fields).encode()
        head = _HEADER.pack(
            _MAGIC, self.shard_bytes, len(self), len(self.fields), len(names), len(self.key_text)
        )
        arrays = (
            self.offsets.astype("<i8"), self.sizes.astype("<i8"),
            self.checksums.astype("<u8"), self.key_ends.astype("<u4"),
        )  # fmt: skip
        body = b"".join([head, names, self.key_text, *(array.tobytes() for array in arrays)])
        return sealed(body)

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Index:
        """Read a sidecar; raises `DataError` naming `source` unless every byte is as written."""
        if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEADER.size + _SEAL.size:
            raise DataError(f"{source}: {_unknown(data)}; make it anew with keel data index")
        if data[-_SEAL.size :] != _SEAL.pack(xxh3_64_intdigest(memoryview(data)[: -_SEAL.size])):
            raise DataError(f"{source}: damaged shard index (checksum); make it anew with keel data index")
        _, size, samples, fields, names_length, keys_length = _HEADER.unpack_from(data)
        cells = samples * fields
        if len(data) != _HEADER.size + names_length + keys_length + _CELL * cells + 4 * samples + _SEAL.size:
            raise DataError(f"{source}: damaged shard index (length); make it anew with keel data index")
        at = _HEADER.size
        try:
            names = tuple(json.loads(data[at : at + names_length]))
        except (ValueError, TypeError, RecursionError):
            names = (None,)
        at += names_length
        keys = data[at : at + keys_length]
        at += keys_length
        offsets = np.frombuffer(data, "<i8", cells, at).reshape(samples, fields)
        sizes = np.frombuffer(data, "<i8", cells, at + 8 * cells).reshape(samples, fields)
        checksums = np.frombuffer(data, "<u8", cells, at + 16 * cells).reshape(samples, fields)
        ends = np.frombuffer(data, "<u4", samples, at + _CELL * cells)
        index = cls(size, names, offsets, sizes, checksums, ends, keys)
        if len(names) != fields or not index._plausible():
            raise DataError(f"{source}: damaged shard index (content); make it anew with keel data index")
        return index

    def _plausible(self) -> bool:
        """Whether every number can be used: no read outside the shard, no key outside the text."""
        ends = self.key_ends.astype(np.int64)
        named = all(isinstance(name, str) and name for name in self.fields)
        inside = (self.offsets >= -1) & (self.sizes >= 0) & (self.sizes <= self.shard_bytes)
        inside &= self.offsets <= self.shard_bytes - self.sizes
        keyed = (np.diff(ends, prepend=0) >= 0).all() and (not len(ends) or ends[-1] == len(self.key_text))
        return bool(named and inside.all() and keyed)


def sealed(body: bytes) -> bytes:
    """A sidecar's bytes with their checksum at the end."""
    return body + _SEAL.pack(xxh3_64_intdigest(body))


def _unknown(data: bytes) -> str:
    """What a file is that doesn't begin like a sidecar of this format."""
    if data[:7] == _MAGIC[:7] and data[7:8].isdigit() and data[7:8] != _MAGIC[7:]:
        return f"a shard index of format {data[7:8].decode()}, and this keel reads {FORMAT}"
    return "not a shard index"


@dataclass(frozen=True)
class _Member:
    key: str
    field: str
    offset: int
    size: int


def index_shard(path: Path) -> tuple[Index, str]:
    """The index of a tar shard and the SHA-256 of the whole file, in hex.

    Raises `DataError` for a file that is missing, not a plain tar, cut short, damaged, or without samples.
    """
    try:
        with path.open("rb") as file:
            members = _members(file, path)
            if not members:
                raise DataError(
                    f"{path}: empty shard: no member is named KEY.FIELD; remove it or pack it again"
                )
            index = _index(file, members)
            return index, _digest(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def split_name(name: str) -> tuple[str, str] | None:
    """Key and field of a member name, split like webdataset at the first dot of the last path part."""
    folder, slash, last = name.rpartition("/")
    stem, dot, field = last.partition(".")
    if not dot or not stem or not field:
        return None
    return folder + slash + stem, field.lower()


def _members(file: BinaryIO, path: Path) -> list[_Member]:
    members: list[_Member] = []
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DataError(f"{path}: empty file where a tar shard should be")
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                # tarfile keeps every header it has seen
                tar.members.clear()  # type: ignore[attr-defined]
                named = split_name(member.name) if member.isreg() and not member.issparse() else None
                if member.offset_data + member.size > size:
                    raise DataError(_cut(path, size, f"member {member.name!r} goes beyond the end"))
                if named is not None:
                    members.append(_Member(*named, member.offset_data, member.size))
            end = tar.offset
    except tarfile.TarError as error:
        if members:
            raise DataError(_cut(path, size, str(error))) from None
        raise DataError(
            f"{path}: not a plain tar file ({error}); compressed tars have to be unpacked"
        ) from None
    except (ValueError, UnicodeError, OverflowError) as error:
        raise DataError(f"{path}: damaged tar header ({error})") from None
    _check_end(file, path, end, size)
    return members


def _check_end(file: BinaryIO, path: Path, end: int, size: int) -> None:
    """A whole tar ends in at least two zero blocks; anything else where headers stop is damage."""
    file.seek(end)
    tail = file.read(_BLOCK)
    if len(tail) < _BLOCK or size - end < 2 * _BLOCK:
        raise DataError(_cut(path, size, "the end mark is missing"))
    while tail:
        if tail.count(0) != len(tail):
            raise DataError(f"{path}: damaged tar header at byte {end}; fetch or pack the shard again")
        tail = file.read(_CHUNK)


def _cut(path: Path, size: int, why: str) -> str:
    return f"{path}: truncated shard: {why} ({size} bytes there); fetch or pack it again"


def _index(file: BinaryIO, members: list[_Member]) -> Index:
    fields = tuple(sorted({member.field for member in members}))
    column = {field: number for number, field in enumerate(fields)}
    keys: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    digests: list[int] = []
    seen: set[str] = set()
    for member in members:
        # webdataset starts a new sample when the key changes, or a field comes again
        if not keys or member.key != keys[-1] or member.field in seen:
            keys.append(member.key)
            seen = set()
        seen.add(member.field)
        rows.append((len(keys) - 1, column[member.field], member.offset, member.size))
        digests.append(_payload_digest(file, member))
    sample, field, offset, size = np.array(rows, np.int64).T
    shape = (len(keys), len(fields))
    offsets, sizes = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    checksums = np.zeros(shape, np.uint64)
    offsets[sample, field], sizes[sample, field] = offset, size
    checksums[sample, field] = np.array(digests, np.uint64)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    ends = np.cumsum([len(key) for key in encoded]).astype(np.uint32)
    total = os.fstat(file.fileno()).st_size
    return Index(total, fields, offsets, sizes, checksums, ends, b"".join(encoded))


def _payload_digest(file: BinaryIO, member: _Member) -> int:
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
