"""Which samples make up a rank's share of a global batch, and the seed of each. Pure numpy, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.hashing import Int64s, key, sample_seed
from data_pipeline.order import Order, rank_cut


@dataclass(frozen=True)
class Draws:
    """Samples to read, in order. Arrays of equal length, int64."""

    source: Int64s  # number of the source
    epoch: Int64s  # the source's own epoch
    shard: Int64s
    sample: Int64s  # number in the shard
    index: Int64s  # number over all sources: stable for a fixed list of sources
    seed: Int64s

    def __len__(self) -> int:
        return len(self.seed)

    def rows(self) -> Int64s:
        """(B, 6) int64: what is sent to a worker."""
        return np.stack([self.source, self.epoch, self.shard, self.sample, self.index, self.seed], axis=1)

    @classmethod
    def from_rows(cls, rows: Int64s) -> Draws:
        return cls(*(np.ascontiguousarray(column) for column in rows.T))


class Plan:
    """The samples of a run over one source; `sizes[i]` samples in shard i.

    There are no more streams than shards: a stream that is less than a shard would only keep samples that lie
    together from ever meeting in a batch.
    """

    def __init__(self, sizes: Sequence[Int64s], *, seed: int, streams: int, window: int):
        self.seed = seed
        self.orders = [
            Order(size, seed=key(seed, number), streams=min(streams, len(size)), window=window)
            for number, size in enumerate(sizes)
        ]
        counts = [order.samples for order in self.orders]
        self.samples = sum(counts)
        self._first = np.concatenate([[0], np.cumsum(counts)])  # index of each source's first sample
        self._starts = [np.concatenate([[0], np.cumsum(order.sizes)]) for order in self.orders]

    def share(self, start: int, batch: int, world: int, rank: int) -> Draws:
        """Rank `rank`'s samples of the global batch that starts at position `start`."""
        positions = np.arange(start, start + batch, dtype=np.int64)
        mine = rank_cut(self.orders[0].stream_of(positions), world, rank)
        return self.draws(positions[mine])

    def draws(self, positions: Int64s) -> Draws:
        places = self.orders[0].take(positions)
        source = np.zeros_like(positions)
        index = self._starts[0][places.shard] + places.sample
        seed = sample_seed(self.seed, places.epoch, source, index)
        return Draws(source, places.epoch, places.shard, places.sample, index, seed)
