"""Is a data set whole? Every byte against its checksum, every picture decoded: `keel data verify`."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.errors import DataError
from data_pipeline.decode import DecodeError, decode
from data_pipeline.index import index_shard
from data_pipeline.manifest import Manifest
from data_pipeline.parallel import Progress, mapped
from data_pipeline.read import CAPTION_FIELDS, IMAGE_FIELDS, LABEL_FIELDS, Reader, SampleError, open_shard
from data_pipeline.remote import FetchError, fetched

_KEPT = 1000  # findings a shard may report; the rest are counted


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    shard: str
    key: str  # empty for the shard itself
    field: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.shard}: sample {self.key!r}: " if self.key else f"{self.shard}: "
        return place + (f"field {self.field}: " if self.field else "") + self.reason


@dataclass
class Report:
    """What `verify` found."""

    samples: int = 0
    shards: int = 0
    findings: list[Finding] = field(default_factory=list)
    more: int = 0  # findings not listed

    @property
    def whole(self) -> bool:
        return not self.findings and not self.more

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "whole": self.whole}, ensure_ascii=False, indent=1)


@dataclass(frozen=True)
class _Task:
    manifest: Path
    shard: int
    pictures: bool


@dataclass
class _Seen:
    samples: int = 0
    findings: list[Finding] = field(default_factory=list)
    more: int = 0
    keys: dict[bytes, str] = field(default_factory=dict)  # digest of a key: the key, for telling

    def add(self, shard: str, key: str, field: str, reason: str) -> None:
        if len(self.findings) < _KEPT:
            self.findings.append(Finding(shard, key, field, reason))
        else:
            self.more += 1


def verify(
    manifest: Manifest, *, pictures: bool = True, processes: int = 1, progress: Progress | None = None
) -> Report:
    """Check every shard: presence, size, SHA-256, tar headers, sidecar, payload checksums, labels, captions,
    keys used twice, and (with `pictures`) that every picture decodes.

    A shard behind a URL is fetched anew to a temporary file, one at a time in each process: a node's cached
    copy would say nothing about what lies there.
    """
    tasks = [_Task(manifest.path, number, pictures) for number in range(len(manifest.shards))]
    report, owners = Report(), dict[bytes, str]()
    for number, seen in enumerate(mapped(_verify_shard, tasks, processes)):
        name = manifest.shards[number].name
        report.shards += 1
        report.samples += seen.samples
        report.findings += seen.findings
        report.more += seen.more
        for digest, key in seen.keys.items():
            owner = owners.setdefault(digest, name)
            if owner != name:
                report.findings.append(Finding(name, key, "", f"its key is also in {owner}"))
        if progress:
            progress(number + 1, len(tasks))
    return report


def _verify_shard(task: _Task) -> _Seen:
    manifest = Manifest.load(task.manifest)
    shard = manifest.shards[task.shard]
    if not shard.remote:
        return _verify_local(manifest, task, manifest.shard_path(task.shard))
    try:
        with fetched(shard.name) as path:
            return _verify_local(manifest, task, path)
    except FetchError as error:
        seen = _Seen()
        seen.add(shard.name, "", "", str(error).removeprefix(f"{shard.name}: "))
        return seen


def _verify_local(manifest: Manifest, task: _Task, path: Path) -> _Seen:
    """Check the shard that lies at `path`."""
    seen, name = _Seen(), manifest.shards[task.shard].name
    try:
        _check_whole(manifest, task.shard, path)
    except DataError as error:
        seen.add(name, "", "", str(error).removeprefix(f"{path}: "))
    try:
        _check_samples(manifest, task, path, seen)
    except DataError as error:
        if not seen.findings:
            seen.add(name, "", "", str(error).removeprefix(f"{path}: "))
    return seen


def _check_whole(manifest: Manifest, number: int, path: Path) -> None:
    """Size, headers, sidecar and SHA-256 of a shard; raises `DataError` for the first that is wrong."""
    shard = manifest.shards[number]
    os.close(open_shard(path, shard.bytes))
    found, digest = index_shard(path)
    if digest != shard.sha256:
        raise DataError(f"{path}: changed shard: its SHA-256 isn't the manifest's")
    if found.to_bytes() != manifest.index(number).to_bytes():
        raise DataError(f"{manifest.index_path(number)}: not the index of this shard; make it anew")


def _check_samples(manifest: Manifest, task: _Task, path: Path, seen: _Seen) -> None:
    shard, reader = manifest.shards[task.shard], Reader(manifest, locate=lambda _: path)
    index = manifest.index(task.shard)
    for sample, key in enumerate(index.keys()):
        seen.samples += 1
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        if digest in seen.keys:
            seen.add(shard.name, key, "", "its key comes twice in this shard")
        seen.keys[digest] = key
        present = [name for column, name in enumerate(index.fields) if index.offsets[sample, column] >= 0]
        if not any(name in IMAGE_FIELDS for name in present):
            seen.add(shard.name, key, "", f"no picture; its fields are {', '.join(present)}")
        for name in present:
            try:
                ((_, data),) = reader.read(task.shard, sample, [(name,)])
                _check_field(manifest, name, data, task.pictures)
            except SampleError as error:
                seen.add(shard.name, key, name, error.reason)
            except ValueError as error:
                seen.add(shard.name, key, name, str(error))
    reader.close()


def _check_field(manifest: Manifest, name: str, data: bytes, pictures: bool) -> None:
    """Raise ValueError with the reason where a field's content can't be used."""
    if name in IMAGE_FIELDS and pictures:
        try:
            decode(data)
        except DecodeError as error:
            raise ValueError(f"can't be decoded: {error}") from None
    if name in LABEL_FIELDS:
        text = data[:40].decode(errors="replace").strip()
        if not text.isdecimal() or (manifest.classes and int(text) >= len(manifest.classes)):
            raise ValueError(f"label {text!r} isn't a class of the {len(manifest.classes)} there are")
    if name in CAPTION_FIELDS:
        try:
            text = data.decode().strip()
            if name == "json":
                json.loads(text)
        except ValueError:
            raise ValueError("not UTF-8 text" if name == "txt" else "not JSON") from None
        if not text:
            raise ValueError("an empty caption")
