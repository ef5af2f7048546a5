"""The list of a data set's shards: a small JSON file whose content hash is the data's identity.

DIR/manifest.json        shards in order, fields, class names, hash
DIR/index/*.idx          one binary sidecar a shard (see `index`)
DIR/shard-000000.tar     the shards, or anywhere a relative path, absolute path or URL leads
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np

from configs.errors import DataError
from data_pipeline.fields import IMAGE_FIELDS, LABEL_FIELDS
from data_pipeline.files import write_whole
from data_pipeline.hashing import Int64s
from data_pipeline.index import SUFFIX, Index
from data_pipeline.members import Split
from data_pipeline.remote import check_name, is_remote

NAME = "manifest.json"
_FORMAT = 1
_MOST = 1 << 48  # samples or bytes of a shard: sums stay within 64 bits


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar. `name` is its path relative to the manifest, an absolute path, or a URL."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @property
    def remote(self) -> bool:
        return is_remote(self.name)

    def as_dict(self) -> dict[str, str | int]:
        """As it stands in manifest.json."""
        return {"name": self.name, "samples": self.samples, "bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class Manifest:
    """A data set: its shards in order. Equal content has an equal `hash`, wherever it was made."""

    directory: Path
    shards: tuple[Shard, ...]
    fields: tuple[str, ...]  # every field that any sample has, sorted
    classes: tuple[str, ...] = ()  # name of each label, empty for unlabelled data
    about: Mapping[str, Any] = field(default_factory=dict)  # how it was made; not part of the hash
    picture_fields: tuple[str, ...] = ()  # that were chosen; empty for the usual ones
    label_fields: tuple[str, ...] = ()
    split: Split = "first"  # how names in its tars became keys and fields

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest.json, or the one in a folder. Raises `DataError` with what to do."""
        file = Path(path)
        if file.is_dir():
            file = file / NAME
        try:
            content = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{file}: no such manifest; make one with keel data pack, demo or index"
            ) from None
        except OSError as error:
            raise DataError(f"{file}: can't be read: {error.strerror or error}") from error
        except (ValueError, RecursionError):
            raise DataError(
                f"{file}: not a manifest: it isn't JSON; make it anew with keel data index"
            ) from None
        return cls._from_content(content, file)

    @classmethod
    def _from_content(cls, content: Any, file: Path) -> Manifest:
        try:
            if content["format"] != _FORMAT:
                raise DataError(f"{file}: manifest format {content['format']!r}, this keel reads {_FORMAT}")
            shards = tuple(_shard(entry, file) for entry in content["shards"])
            manifest = cls(
                directory=file.absolute().parent,
                shards=shards,
                fields=_strings(content["fields"]),
                classes=_strings(content["classes"]),
                about=dict(content.get("about", {})),
                picture_fields=_strings(content.get("picture_fields", [])),
                label_fields=_strings(content.get("label_fields", [])),
                split=_split(content.get("split", "first")),
            )
            recorded = content["hash"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{file}: not a whole manifest ({what}); make it anew with keel data index"
            ) from None
        if recorded != manifest.hash:
            raise DataError(
                f"{file}: its hash is {recorded!r} but its content has {manifest.hash!r}: it was changed "
                "by hand; make it anew with keel data index"
            )
        return manifest._checked(file)

    def _checked(self, file: Path) -> Manifest:
        if self.samples == 0:
            raise DataError(f"{file}: no samples in any shard")
        empty = next((shard.name for shard in self.shards if shard.samples == 0), None)
        if empty is not None:
            raise DataError(f"{file}: empty shard {empty}; leave it out and make the manifest anew")
        seen: set[str] = set()
        for shard in self.shards:
            place = shard.name if shard.remote else os.path.normpath(self.directory / shard.name)
            if place in seen:
                raise DataError(
                    f"{file}: names shard {shard.name} twice; make it anew with keel data index, naming "
                    "every shard once"
                )
            seen.add(place)
        return self

    @property
    def pictures(self) -> tuple[str, ...]:
        """The fields that a sample's picture may be in."""
        return self.picture_fields or IMAGE_FIELDS

    @property
    def labels(self) -> tuple[str, ...]:
        """The fields that a sample's class number may be in."""
        return self.label_fields or LABEL_FIELDS

    @property
    def labelled(self) -> bool:
        """Whether any sample has a label."""
        return any(name in self.fields for name in self.labels)

    @cached_property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def sizes(self) -> Int64s:
        """Samples in each shard, int64."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the shards' content in order, classes and chosen fields: no path, no date."""
        digest = hashlib.sha256(b"keel manifest 1\n")
        for shard in self.shards:
            digest.update(f"{shard.sha256} {shard.samples}\n".encode())
        digest.update(json.dumps(self.classes).encode())
        if self._chosen:
            digest.update(json.dumps(self._chosen, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def _chosen(self) -> dict[str, Any]:
        """What was chosen and isn't the usual."""
        chosen: dict[str, Any] = {
            "picture_fields": list(self.picture_fields),
            "label_fields": list(self.label_fields),
        }
        if self.split != "first":
            chosen["split"] = self.split
        return {name: value for name, value in chosen.items() if value}

    @property
    def path(self) -> Path:
        return self.directory / NAME

    def shard_path(self, number: int) -> Path:
        """Where a local shard lies."""
        return self.directory / self.shards[number].name

    def index_path(self, number: int) -> Path:
        return self.directory / "index" / index_name(self.shards[number].sha256)

    def index(self, number: int) -> Index:
        """The sidecar of shard `number`; raises `DataError` where missing, damaged or of another shard."""
        path, shard = self.index_path(number), self.shards[number]
        try:
            index = Index.from_bytes(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise DataError(
                f"{path}: no index for shard {shard.name}; make it with keel data index"
            ) from None
        if (len(index), index.shard_bytes) != (shard.samples, shard.bytes):
            raise DataError(
                f"{path}: an index of {len(index)} samples and {index.shard_bytes} bytes, but {shard.name} "
                f"has {shard.samples} and {shard.bytes}; make it anew with keel data index"
            )
        return index

    def save(self) -> None:
        """Write manifest.json, whole or not at all. Sidecars are written by `save_index`."""
        content = {
            "format": _FORMAT,
            "hash": self.hash,
            "samples": self.samples,
            "bytes": self.bytes,
            "fields": self.fields,
            "classes": self.classes,
            **self._chosen,
            "about": dict(self.about),
            "shards": [shard.as_dict() for shard in self.shards],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        # What isn't UTF-8 in a path or field is half a surrogate pair here, which JSON can spell as \udcXX
        write_whole(self.path, text.encode("utf-8", "backslashreplace"))


def index_name(sha256: str) -> str:
    """Sidecars are named by content, so that an interrupted indexing finds what it has done."""
    return sha256[:32] + SUFFIX


def save_index(directory: Path, index: Index, sha256: str) -> None:
    """Put a shard's sidecar where the manifest in `directory` looks for it."""
    write_whole(directory / "index" / index_name(sha256), index.to_bytes())


def all_fields(indexes: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for fields in indexes for name in fields}))


def _shard(entry: Any, file: Path) -> Shard:
    if not isinstance(entry["name"], str):
        raise TypeError("a shard's name is text")
    shard = Shard(entry["name"], int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]))
    try:
        check_name(shard.name)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    if (
        not 0 <= shard.samples < _MOST
        or not 0 <= shard.bytes < _MOST
        or not re.fullmatch("[0-9a-f]{64}", shard.sha256)
    ):
        raise ValueError(f"shard {shard.name}")
    return shard


def _strings(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("a list of names was expected")
    return tuple(values)


def _split(value: Any) -> Split:
    if value not in get_args(Split):
        raise ValueError(f"split {value!r}")
    found: Split = value
    return found


def relative_name(shard: Path, directory: Path) -> str:
    """How a manifest in `directory` should name a local shard: relative when it lies below."""
    absolute = shard.absolute()
    if absolute.is_relative_to(directory.absolute()):
        return str(PurePosixPath(absolute.relative_to(directory.absolute())))
    return str(absolute)
