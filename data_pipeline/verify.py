"""Is a data set whole? Every byte against its checksum, every picture decoded: `keel data verify`."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.errors import DataError
from data_pipeline.account import Account, some
from data_pipeline.books import Books
from data_pipeline.decode import DecodeError, decode
from data_pipeline.index import Index, survey
from data_pipeline.manifest import Manifest
from data_pipeline.members import shown
from data_pipeline.parallel import Progress, mapped
from data_pipeline.read import CAPTION_FIELDS, Reader, SampleError, label_in, open_shard
from data_pipeline.recount import Field, recount
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
    members: Books = field(default_factory=lambda: Books("members"))  # of the tars, counted anew

    @property
    def whole(self) -> bool:
        return not self.findings and not self.more

    def to_json(self) -> str:
        """Text that UTF-8 can hold, whatever bytes the names have."""
        text = json.dumps({**asdict(self), "whole": self.whole}, ensure_ascii=False, indent=1)
        return text.encode("utf-8", "backslashreplace").decode()


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
    members: Books | None = None  # where the tar could be listed

    def add(self, shard: str, key: str, field: str, reason: str) -> None:
        if len(self.findings) < _KEPT:
            self.findings.append(Finding(shard, key, field, reason))
        else:
            self.more += 1


def verify(
    manifest: Manifest,
    *,
    pictures: bool = True,
    shared_keys: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Check every shard: presence, size, SHA-256, tar headers, sidecar, payload checksums, labels, captions,
    keys used twice, and (with `pictures`) that every picture decodes.

    The members of every tar are counted anew by a second road, plain `tarfile`: each has to be in the
    sidecar, or passed over for a reason that the manifest tells too. `shared_keys`: shards may have keys in
    common, as those of several downloads have; within a shard they stay wrong.

    A shard behind a URL is fetched anew to a temporary file, one at a time in each process: a node's cached
    copy would say nothing about what lies there.
    """
    tasks = [_Task(manifest.path, number, pictures) for number in range(len(manifest.shards))]
    report, owners = Report(), dict[bytes, int]()
    uncounted = 0
    for number, seen in enumerate(mapped(_verify_shard, tasks, processes)):
        report.shards += 1
        report.samples += seen.samples
        report.findings += seen.findings
        report.more += seen.more
        uncounted += seen.members is None
        report.members.add(seen.members or Books("members"))
        if not shared_keys:
            report.findings += _shared(manifest, number, seen.keys, owners)
        if progress:
            progress(number + 1, len(tasks))
    if not uncounted:
        report.findings += _unlike_manifest(manifest, report.members)
    return report


def _shared(
    manifest: Manifest, number: int, keys: Mapping[bytes, str], owners: dict[bytes, int]
) -> list[Finding]:
    """Keys that an earlier shard has too: one finding for each such shard."""
    found: dict[int, list[str]] = {}
    for digest, key in keys.items():
        owner = owners.setdefault(digest, number)
        if owner != number:
            found.setdefault(owner, []).append(key)
    name, findings = manifest.shards[number].name, []
    for owner, shared in found.items():
        other, more = manifest.shards[owner].name, len(shared) - 1
        told = f"its key is also in {other}" + (f", and {more} more of this shard's" if more else "")
        findings.append(Finding(name, shared[0], "", told))
    return findings


def _unlike_manifest(manifest: Manifest, members: Books) -> list[Finding]:
    """What the manifest says was left out of the tars, against what was counted."""
    try:
        told = Account.from_dict(manifest.about["indexed"]).members
    except (KeyError, TypeError, ValueError, AttributeError):
        return []  # packed, or made before there was such an account
    counts = [{reason: left.count for reason, left in one.left_out.items()} for one in (told, members)]
    return [
        Finding(
            manifest.path.name, "", "",
            f"says that {counts[0].get(reason, 0)} members are left out as {reason}, but there are "
            f"{counts[1].get(reason, 0)}; index the shards anew",
        )
        for reason in sorted(counts[0].keys() | counts[1].keys())
        if counts[0].get(reason, 0) != counts[1].get(reason, 0)
    ]  # fmt: skip


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
        seen.members = _check_members(manifest, task.shard, path)
    except DataError as error:
        seen.add(name, "", "", str(error).removeprefix(f"{path}: "))
    try:
        _check_samples(manifest, task, path, seen)
    except DataError as error:
        if not seen.findings:
            seen.add(name, "", "", str(error).removeprefix(f"{path}: "))
    return seen


def _check_whole(manifest: Manifest, number: int, path: Path) -> None:
    """Size and SHA-256 of a shard; raises `DataError` that says what is wrong, as exactly as can be told."""
    shard = manifest.shards[number]
    os.close(open_shard(path, shard.bytes))
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    if digest != shard.sha256:
        survey(path, manifest.split)  # a damaged header or end has a message of its own
        raise DataError(f"{path}: changed shard: its SHA-256 isn't the manifest's")


def _check_members(manifest: Manifest, number: int, path: Path) -> Books:
    """Count a tar's members anew; raises `DataError` for the first that the sidecar has otherwise."""
    counted, books = recount(path, manifest.split)
    indexed = _indexed(manifest.index(number))
    if counted != indexed:
        missing, extra = counted - indexed, indexed - counted
        key, name, *_ = next(iter(missing or extra))
        raise DataError(
            f"{path}: {missing.total()} members of the tar aren't in its index and {extra.total()} of the "
            f"index aren't in the tar, for instance '{shown(f'{key}.{name}')}': not the index of this shard; "
            "make it anew"
        )
    return books


def _indexed(index: Index) -> Counter[Field]:
    """How often each field is in a sidecar."""
    keys, names = index.keys(), index.fields
    samples, numbers = index.sample_of.tolist(), index.field_of.tolist()
    places = zip(samples, numbers, index.offset.tolist(), index.size.tolist(), strict=True)
    return Counter((keys[sample], names[number], at, size) for sample, number, at, size in places)


def _check_samples(manifest: Manifest, task: _Task, path: Path, seen: _Seen) -> None:
    shard, reader = manifest.shards[task.shard], Reader(manifest, locate=lambda _: path)
    index = manifest.index(task.shard)
    for sample, key in enumerate(index.keys()):
        seen.samples += 1
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        if digest in seen.keys:
            seen.add(shard.name, key, "", "its key comes twice in this shard")
        seen.keys[digest] = key
        present = index.fields_of(sample)
        if not any(name in manifest.pictures for name in present):
            seen.add(shard.name, key, "", f"no picture; its fields are {some(present)}")
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
    if name in manifest.pictures and pictures:
        try:
            decode(data)
        except DecodeError as error:
            raise ValueError(f"can't be decoded: {error}") from None
    if name in manifest.labels:
        label = label_in(data)
        if manifest.classes and label >= len(manifest.classes):
            raise ValueError(f"label '{label}' isn't a class of the {len(manifest.classes)} there are")
    if name in CAPTION_FIELDS:
        try:
            text = data.decode().strip()
            if name == "json":
                json.loads(text)
        except ValueError:
            raise ValueError("not UTF-8 text" if name == "txt" else "not JSON") from None
        if not text:
            raise ValueError("an empty caption")
