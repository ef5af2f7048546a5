"""Any webdataset tars to a manifest: `keel data index`. A strict pass over each, in parallel, resumable."""

from __future__ import annotations

import glob
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from configs.errors import DataError
from data_pipeline.files import write_whole
from data_pipeline.index import FORMAT, index_shard
from data_pipeline.manifest import Manifest, Shard, all_fields, index_name, relative_name, save_index
from data_pipeline.parallel import Progress, mapped
from data_pipeline.remote import check_name, fetch, is_remote, listed


@dataclass(frozen=True)
class Indexed:
    """A shard whose sidecar is in place."""

    shard: Shard
    fields: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    name: str  # path or URL as given
    directory: Path  # of the manifest


def index(
    patterns: Sequence[str],
    out: Path,
    *,
    classes: Sequence[str] = (),
    processes: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Write OUT/manifest.json and OUT/index/ for the shards that `patterns` name, in the order given.

    A pattern is a path or URL, with braces (`{000000..000123}.tar`) or a glob. Shards stay where they are. An
    interrupted indexing goes on where it stopped. Raises `DataError` naming the first bad shard.
    """
    names = expanded(patterns)
    tasks = [_Task(name, out) for name in names]
    done: list[Indexed] = []
    for one in mapped(_index_one, tasks, processes):
        done.append(one)
        if progress:
            progress(len(done), len(tasks))
    fields = all_fields(one.fields for one in done)
    manifest = Manifest(out.absolute(), tuple(one.shard for one in done), fields, tuple(classes))
    manifest.save()
    for task in tasks:
        _receipt(task).unlink(missing_ok=True)
    return Manifest.load(out)


def expanded(patterns: Sequence[str]) -> list[str]:
    """The shards that brace and glob patterns name; sorted within a glob. Raises `DataError` for none."""
    names: list[str] = []
    for pattern in patterns:
        try:
            pieces = list(braceexpand(pattern))
        except ValueError:
            raise DataError(f"{pattern}: its braces don't match") from None
        for piece in pieces:
            globbed = any(sign in piece for sign in "*?[")
            found = _globbed(piece) if globbed else [piece]
            if not found:
                raise DataError(f"{piece}: matches no shard")
            names += found
    if not names:
        raise DataError("no shards were named")
    for name in names:
        check_name(name)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]}: named twice; name every shard once")
    return names


def _globbed(pattern: str) -> list[str]:
    return listed(pattern) if is_remote(pattern) else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 absolute patterns


def add_shard(directory: Path, path: Path, name: str) -> Indexed:
    """Index a local shard and put its sidecar below `directory`."""
    found, digest = index_shard(path)
    save_index(directory, found, digest)
    return Indexed(Shard(name, len(found), found.shard_bytes, digest), found.fields)


def _index_one(task: _Task) -> Indexed:
    stamp, receipt = _stamp(task.name), _receipt(task)
    if receipt.exists():
        kept = json.loads(receipt.read_text())
        made = Indexed(Shard(**kept["shard"]), tuple(kept["fields"]))
        if kept["stamp"] == stamp and (task.directory / "index" / index_name(made.shard.sha256)).exists():
            return made
    if is_remote(task.name):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "shard.tar"
            fetch(task.name, local)
            indexed = _named(task, local, task.name)
    else:
        indexed = add_shard(task.directory, Path(task.name), relative_name(Path(task.name), task.directory))
    content = {"stamp": stamp, "shard": indexed.shard.as_dict(), "fields": indexed.fields}
    write_whole(receipt, json.dumps(content).encode())
    return indexed


def _named(task: _Task, local: Path, name: str) -> Indexed:
    """Errors about a fetched copy name the URL."""
    try:
        return add_shard(task.directory, local, name)
    except DataError as error:
        raise DataError(str(error).replace(str(local), name)) from None


def _stamp(name: str) -> list[int]:
    """What tells a changed local shard, or a sidecar of another format, from what was made before."""
    if is_remote(name):
        return [FORMAT]
    try:
        found = Path(name).stat()
    except OSError:
        return [FORMAT]  # indexing will say what is wrong with it
    return [FORMAT, found.st_size, found.st_mtime_ns]


def _receipt(task: _Task) -> Path:
    plain = "".join(sign if sign.isalnum() or sign in "-._" else "_" for sign in task.name)
    return task.directory / "index" / f"{plain[-120:]}.receipt"
