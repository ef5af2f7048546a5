"""Shards as webdataset has them: written byte for byte as by its TarWriter, streamed through its own reader.

The only module that knows the library, and only where it streams: importing it costs two seconds, since it
imports torch, and packing needs neither.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import DataError
from data_pipeline.files import published
from data_pipeline.remote import is_remote, opened


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, field -> bytes) samples as one tar; gives their number.

    The same samples give the same bytes: no time, user or order of a mapping enters. The file is whole or
    absent.
    """
    with published(path) as file:
        return write_samples(file, samples)


def write_samples(file: BinaryIO, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """As `write_shard`, into an open file."""
    count = 0
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key, fields in samples:
            check_key(key)
            for field in sorted(fields):
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size, member.mode, member.mtime = len(fields[field]), 0o444, 0
                member.uname = member.gname = "keel"
                tar.addfile(member, io.BytesIO(fields[field]))
            count += 1
    return count


def check_key(key: str) -> None:
    """Raise `DataError` unless webdataset would read `key` back as it is, from a USTAR header."""
    last = key.rpartition("/")[2]
    if not last or "." in last or key.startswith("/") or len(key.encode()) > 80:
        raise DataError(
            f"{key!r} can't be a sample's key: at most 80 bytes, no dot in the last part, not empty"
        )


def read_stream(
    urls: Sequence[str], *, shuffle: int, seed: int, allow_shell: bool
) -> Generator[tuple[str, str, dict[str, bytes]], None, None]:
    """Samples of unindexed tars, for ever, through webdataset's own reader: (shard, key, field -> bytes).

    Nothing is decoded here, so no pickle in a shard is ever opened. `pipe:` names run a shell command and
    need `allow_shell`. Raises `DataError`.
    """
    import webdataset
    from webdataset.tariterators import group_by_keys, tar_file_expander

    commands = [url for url in urls if url.startswith("pipe:")]
    if commands and not allow_shell:
        raise DataError(f"{commands[0]!r}: runs a shell command; set allow_shell to permit it")
    rng, count, before = random.Random(seed), 0, -1
    try:
        while count > before:
            before = count
            with closing(_streams(urls)) as streams:
                samples = group_by_keys(tar_file_expander(streams))
                for sample in webdataset.shuffle(shuffle, rng=rng)(samples) if shuffle else samples:
                    count += 1
                    fields = {name: value for name, value in sample.items() if not name.startswith("__")}
                    yield str(sample["__url__"]), str(sample["__key__"]), fields
    except Exception as error:  # every fsspec backend has exceptions of its own
        told = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{urls[0]} and following: can't be streamed: {told}") from error
    raise DataError(f"{urls[0]} and following: can't be streamed: no sample in any of them")


def _streams(urls: Sequence[str]) -> Generator[dict[str, Any], None, None]:
    """Open tars, one after the other. URLs through fsspec: webdataset would hand them to curl in a shell."""
    for url in urls:
        with _opened(url) as stream:
            yield {"url": url, "stream": stream}


def _opened(url: str) -> AbstractContextManager[Any]:
    if url.startswith("pipe:"):
        import webdataset

        command: AbstractContextManager[Any] = webdataset.gopen(url, "rb")
        return command
    return opened(url) if is_remote(url) else Path(url).open("rb")
