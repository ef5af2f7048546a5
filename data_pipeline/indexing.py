"""Any webdataset tars to a manifest: `keel data index`. A strict pass over each, in parallel, resumable."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import DataError
from data_pipeline.account import AGAIN, APART, MORE_PICTURES, NO_PICTURE, SAME_BYTES, Account, some
from data_pipeline.fields import IMAGE_FIELDS
from data_pipeline.files import write_whole
from data_pipeline.index import FORMAT, Index, Surveyed, fields_counted, survey
from data_pipeline.labels import doubt_labels
from data_pipeline.manifest import Manifest, Shard, all_fields, index_name, relative_name, save_index
from data_pipeline.members import Split, shown
from data_pipeline.parallel import Progress, mapped
from data_pipeline.patterns import described, expanded
from data_pipeline.remote import FetchError, fetch, is_remote, version_of

_UNREACHABLE = 4  # shards in a row that can't be fetched: no more are tried
_BAD_SHOWN = 200  # bad shards that are listed


@dataclass(frozen=True)
class Fields:
    """What is taken from the shards, and how their members' names are split."""

    picture: tuple[str, ...] = ()  # empty: the usual endings
    label: tuple[str, ...] = ()
    split: Split = "first"


@dataclass(frozen=True)
class Indexed:
    """A shard whose sidecar is in place."""

    shard: Shard
    fields: tuple[str, ...]
    account: Account = field(default_factory=Account)


@dataclass(frozen=True)
class _Bad:
    """A shard that can't be used."""

    reason: str  # a line that names it
    kind: str  # of the fault, for the account
    unreachable: bool = False


@dataclass(frozen=True)
class _Task:
    name: str  # path or URL as given
    directory: Path  # of the manifest
    fields: Fields


def index(
    patterns: Sequence[str],
    out: Path,
    *,
    classes: Sequence[str] = (),
    fields: Fields | None = None,
    processes: int = 1,
    skip_broken: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write OUT/manifest.json and OUT/index/ for the shards that `patterns` name, in the order given.

    A pattern is a path, a folder or a URL, with braces (`{000000..000123}.tar`) or a glob. Shards stay where
    they are. An interrupted indexing goes on where it stopped. What wasn't taken stands in the manifest's
    `about`. Raises `DataError` with a line for each bad shard where there are more than `skip_broken`, and,
    where `strict`, for everything that was left out; then there is no manifest.
    """
    fields = fields or Fields()
    tasks = [_Task(name, out, fields) for name in expanded(patterns)]
    with writing(out):
        (out / "index").mkdir(parents=True, exist_ok=True)
        write_whole(out / "index" / ".writable", b"")  # said now, and not when all shards have been read
        (out / "index" / ".writable").unlink()
    done, bad = _all_indexed(tasks, processes, progress)
    if len(bad) > skip_broken or not done:
        raise DataError(_all_bad(bad, len(tasks)))
    account, known = _account(done, bad), all_fields(one.fields for one in done.values())
    manifest = Manifest(
        out.absolute(),
        tuple(one.shard for one in done.values()),
        known,
        tuple(classes),
        picture_fields=fields.picture,
        label_fields=fields.label,
        split=fields.split,
    )
    _require_chosen(manifest)
    doubt_labels(manifest, account)
    if strict:
        account.require_nothing_left_out(str(out), known)
    manifest = replace(manifest, about={"indexed": account.as_dict()})
    with writing(out):
        manifest.save()
        for receipt in (out / "index").glob("*.receipt"):
            receipt.unlink(missing_ok=True)
    return Manifest.load(out)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raises `DataError` in a line where `place` can't be written."""
    try:
        yield
    except OSError as error:
        raise CantWriteError(
            f"{place}: can't be written: {error.strerror or error}; nothing was published there"
        ) from error


class CantWriteError(DataError):
    """The set's own folder can't be written; no fault of a shard."""


def add_shard(directory: Path, path: Path, name: str, fields: Fields | None = None) -> Indexed:
    """Index a local shard and put its sidecar below `directory`."""
    fields = fields or Fields()
    found = survey(path, fields.split)
    with writing(directory):
        save_index(directory, found.index, found.sha256)
    shard = Shard(name, len(found.index), found.index.shard_bytes, found.sha256)
    return Indexed(shard, found.index.fields, _account_of(found, fields))


def _account_of(found: Surveyed, fields: Fields) -> Account:
    """What is to be said of one shard."""
    account, index = Account(found.books), found.index
    counts = fields_counted(index, fields.picture or IMAGE_FIELDS)
    for doubt, found_so in ((NO_PICTURE, counts == 0), (MORE_PICTURES, counts > 1)):
        numbers = np.flatnonzero(found_so).tolist()
        examples = [f"{shown(index.key(n))} ({some(index.fields_of(n))})" for n in numbers[:3]]
        account.doubt(doubt, examples, len(numbers))
    account.doubt(AGAIN, map(shown, found.again[:3]), len(found.again))
    account.doubt(APART, map(shown, found.apart[:3]), len(found.apart))
    return account


def _account(done: Mapping[str, Indexed], bad: Mapping[str, _Bad]) -> Account:
    """What is to be said of the whole set."""
    account, first = Account(), dict[str, str]()
    for name, one in done.items():
        account.add(one.account)
        account.shards.take()
        before = first.setdefault(one.shard.sha256, name)
        if before != name:
            account.doubt(SAME_BYTES, [f"{described(name)} as {described(before)}"], 1)
    for name, one_bad in bad.items():
        account.shards.leave_out(one_bad.kind, described(name))
    return account


def _all_indexed(
    tasks: Sequence[_Task], processes: int, progress: Progress | None
) -> tuple[dict[str, Indexed], dict[str, _Bad]]:
    """Good and bad shards by name, in order. No more are tried where several in a row are out of reach."""
    done: dict[str, Indexed] = {}
    bad: dict[str, _Bad] = {}
    unreachable = 0
    with closing(mapped(_index_one, tasks, processes)) as results:
        for number, (task, one) in enumerate(zip(tasks, results, strict=True), 1):
            if isinstance(one, Indexed):
                done[task.name] = one
            else:
                bad[task.name] = one
            unreachable = unreachable + 1 if isinstance(one, _Bad) and one.unreachable else 0
            if unreachable == _UNREACHABLE and number < len(tasks):
                raise DataError(
                    f"{_listed(bad)}\n{_UNREACHABLE} shards in a row are out of reach: the other "
                    f"{len(tasks) - number} weren't tried; index again when the server answers"
                )
            if progress:
                progress(number, len(tasks))
    return done, bad


def _listed(bad: Mapping[str, _Bad]) -> str:
    lines = [one.reason for one in bad.values()]
    more = [f"... and {len(lines) - _BAD_SHOWN} more"] if len(lines) > _BAD_SHOWN else []
    return "\n".join([*lines[:_BAD_SHOWN], *more])


def _all_bad(bad: Mapping[str, _Bad], shards: int) -> str:
    """Every bad shard on a line, and what to do about them."""
    if shards == 1:
        return _listed(bad)
    return (
        f"{_listed(bad)}\n{len(bad)} of {shards} shards can't be used; mend or remove them, or leave them "
        f"out with --skip-broken {len(bad)} (the others are kept: indexing again is quick)"
    )


def _require_chosen(manifest: Manifest) -> None:
    """Fields that the user chose have to be there."""
    for option, names in (
        ("--picture-field", manifest.picture_fields),
        ("--label-field", manifest.label_fields),
    ):
        missing = [name for name in names if name not in manifest.fields]
        if missing:
            raise DataError(
                f"{option}: found {missing[0]}, but the shards have the fields {some(manifest.fields)}"
            )


def _index_one(task: _Task) -> Indexed | _Bad:
    try:
        return _indexed(task)
    except CantWriteError:
        raise
    except FetchError as error:
        return _Bad(str(error), "can't be fetched", unreachable="attempts" in str(error))
    except DataError as error:
        return _Bad(str(error), _kind_of(str(error).replace(task.name, "")))


def _kind_of(reason: str) -> str:
    """The reason without names and numbers, so that shards of one kind are counted together."""
    kinds = (
        "empty shard",
        "empty file",
        "truncated",
        "damaged tar header",
        "no such shard",
        "not a plain tar",
    )
    return next((kind for kind in kinds if kind in reason), "can't be used")


def _indexed(task: _Task) -> Indexed:
    stamp, receipt = _stamp(task), _receipt(task)
    made = _kept(task, receipt, stamp)
    if made is not None:
        return made
    if is_remote(task.name):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "shard.tar"
            try:
                fetch(task.name, local)
            except FetchError:
                raise
            except DataError as error:  # no room for the copy: no fault of the shard
                raise CantWriteError(str(error)) from error
            try:
                made = add_shard(task.directory, local, task.name, task.fields)
            except CantWriteError:
                raise
            except DataError as error:  # names the URL, and not the copy
                raise DataError(str(error).replace(str(local), task.name)) from None
    else:
        path = Path(task.name)
        made = add_shard(task.directory, path, relative_name(path, task.directory), task.fields)
    if stamp is not None:
        content = {
            "name": task.name, "stamp": stamp, "shard": made.shard.as_dict(), "fields": made.fields,
            "account": made.account.as_dict(),
        }  # fmt: skip
        with writing(task.directory):
            write_whole(receipt, json.dumps(content).encode())
    return made


def _kept(task: _Task, receipt: Path, stamp: list[Any] | None) -> Indexed | None:
    """What an interrupted indexing made of this very shard; None where that isn't certain."""
    if stamp is None:
        return None
    try:
        kept = json.loads(receipt.read_bytes())
        if (kept["name"], kept["stamp"]) != (task.name, stamp):
            return None
        made = Indexed(Shard(**kept["shard"]), tuple(kept["fields"]), Account.from_dict(kept["account"]))
        Index.from_bytes((task.directory / "index" / index_name(made.shard.sha256)).read_bytes(), "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        return None
    return made


def _stamp(task: _Task) -> list[Any] | None:
    """What tells this version of a shard, and this way of reading it, from others; None for nothing."""
    reading = [FORMAT, task.fields.split, list(task.fields.picture)]
    if is_remote(task.name):
        version = version_of(task.name)
        return None if version is None else [*reading, version]
    try:
        found = Path(task.name).stat()
    except (OSError, ValueError):
        return None  # indexing will say what is wrong with it
    return [*reading, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _receipt(task: _Task) -> Path:
    """Named by all of the shard's name: two shards never share one."""
    digest = hashlib.sha256(os.fsencode(task.name)).hexdigest()
    return task.directory / "index" / f"{digest[:40]}.receipt"
