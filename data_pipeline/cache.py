"""Remote shards in a bounded folder of the node: fetched whole, once a node, ahead of need.

    DIR/<sha256>.tar     a shard, complete and checked
    DIR/<sha256>-fetch.lock   held while somebody fetches it; holds the bytes to come
Names come from the manifest's checksums, never from a URL, so that different sets can't collide. What was
used longest ago goes first; a reader that still has an evicted shard open keeps it until it is done.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, PositiveFloat

from configs.errors import ConfigError, fault_of_place
from configs.loading import Config
from data_pipeline.locks import locked
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.remote import fetch

_THREADS = 4  # fetching ahead, each rank


class CacheConfig(Config):
    """YAML key `data.cache`: where shards behind a URL are kept while they are read."""

    directory: Path
    gigabytes: PositiveFloat = 100.0
    timeout: PositiveFloat = Field(60.0, description="seconds without a byte before a fetch is tried again")


class Cache:
    """A node's copies of remote shards, shared by every rank and worker.

    Copies and fetches under way together stay within the limit.
    """

    def __init__(self, config: CacheConfig):
        self.config = config
        self.limit = int(config.gigabytes * 1e9)

    def locate(self, shard: Shard) -> Path:
        """The local copy of a shard, fetched now if it must be. Raises `UserError`."""
        path = self.path(shard)
        try:
            self._fetch_if_missing(path, shard)
        except OSError as error:
            known = fault_of_place(error)
            if known is None:
                raise
            raise ConfigError(f"data.cache.directory: {known}") from None
        return path

    def _fetch_if_missing(self, path: Path, shard: Shard) -> None:
        if not self._touched(path, shard):
            with self._locked(shard):
                if not self._touched(path, shard):  # somebody else may have fetched it meanwhile
                    self._evict()
                    fetch(
                        shard.name, path, size=shard.bytes, sha256=shard.sha256, timeout=self.config.timeout
                    )

    def path(self, shard: Shard) -> Path:
        return self.config.directory / f"{shard.sha256}.tar"

    def _touched(self, path: Path, shard: Shard) -> bool:
        """Whether a whole copy is there; marks it as used now."""
        try:
            if path.stat().st_size != shard.bytes:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError as error:  # a copy of somebody else's serves as well, where it can only be read
            return error.errno in (errno.EPERM, errno.EACCES, errno.EROFS)
        return True

    def _evict(self) -> None:
        """Remove what was used longest ago until the fetches under way, ours among them, fit."""
        with (self.config.directory / "evict.lock").open("a") as turn:
            locked(turn)
            self._evict_alone(self._under_way())

    def _under_way(self) -> int:
        """Bytes of the shards whose lock somebody holds."""
        total = 0
        for lock in self.config.directory.glob("*-fetch.lock"):
            with lock.open() as file:
                if locked(file, wait=False) is False:
                    total += int(file.read() or 0)
        return total

    def _evict_alone(self, coming: int) -> None:
        kept: list[tuple[int, int, Path]] = []
        for path in self.config.directory.glob("*.tar"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            kept.append((found.st_mtime_ns, found.st_size, path))
        used = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if used + coming <= self.limit:
                return
            path.unlink(missing_ok=True)
            used -= size

    @contextmanager
    def _locked(self, shard: Shard) -> Iterator[None]:
        self.config.directory.mkdir(parents=True, exist_ok=True)
        lock = self.config.directory / f"{shard.sha256}-fetch.lock"
        with lock.open("a+") as file:
            locked(file)
            file.truncate(0)
            file.write(str(shard.bytes))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


def locator(manifest: Manifest, cache: CacheConfig | None) -> Callable[[int], Path]:
    """Where the shards of a manifest are read: the cache for remote ones, their own place for others."""
    kept = Cache(cache) if cache else None

    def locate(number: int) -> Path:
        shard = manifest.shards[number]
        if shard.remote and kept is not None:
            return kept.locate(shard)
        return manifest.shard_path(number)

    return locate


def check_size(
    cache: CacheConfig | None, manifests: Iterable[Manifest], open_shards: Iterable[float]
) -> None:
    """Refuse a cache that can't hold what is read from at a time. Raises `ConfigError`."""
    needed = 0.0
    for manifest, count in zip(manifests, open_shards, strict=True):
        sizes = sorted((shard.bytes for shard in manifest.shards if shard.remote), reverse=True)
        needed += sum(sizes[: int(count) + 1])
        if sizes and cache is None:
            raise ConfigError(
                f"data.cache: {manifest.path} has shards behind URLs; name a folder to keep them in "
                "(data.cache.directory=DIR; keel data bench has --cache DIR)"
            )
    if cache is not None and needed > cache.gigabytes * 1e9:
        raise ConfigError(
            f"data.cache.gigabytes: found {cache.gigabytes:g}, but the shards read at a time take "
            f"{needed / 1e9:.2g}; raise it, or lower data.streams or data.window"
        )


class Ahead:
    """Fetches shards before they are needed, in threads that end with `close`."""

    def __init__(self, cache: CacheConfig, manifests: Iterable[Manifest]):
        self._locators = [locator(manifest, cache) for manifest in manifests]
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="keel-fetch")
        self._asked: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self.fetched = 0
        self.waiting = 0

    def ask(self, shards: Iterable[tuple[int, int]]) -> None:
        """Have (source, shard) pairs fetched soon. What was asked for lately isn't asked for again."""
        for pair in shards:
            with self._lock:
                if pair in self._asked:
                    continue
                self._asked.add(pair)
                self.waiting += 1
            self._executor.submit(self._fetch, pair)

    def forget(self, keep: set[tuple[int, int]]) -> None:
        """Only `keep` counts as asked for: the others may have been evicted by the time they come again."""
        with self._lock:
            self._asked &= keep

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, pair: tuple[int, int]) -> None:
        source, shard = pair
        try:
            self._locators[source](shard)
            with self._lock:
                self.fetched += 1
        except Exception:  # the worker that needs it will meet the same error and say it
            with self._lock:
                self._asked.discard(pair)
        finally:
            with self._lock:
                self.waiting -= 1
