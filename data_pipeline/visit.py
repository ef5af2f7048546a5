"""Looking at a set shard by shard, wherever its shards lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from data_pipeline.manifest import Manifest
from data_pipeline.read import Reader
from data_pipeline.remote import fetched


@contextmanager
def reading(manifest: Manifest, shard: int) -> Iterator[Reader]:
    """A reader for one shard, which is fetched for the time where it lies behind a URL."""
    if not manifest.shards[shard].remote:
        with closing(Reader(manifest)) as reader:
            yield reader
        return
    with fetched(manifest.shards[shard].name) as path, closing(Reader(manifest, lambda _: path)) as reader:
        yield reader
