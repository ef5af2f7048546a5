"""Which samples make up a rank's share of a global batch, and the seed of each. Pure numpy, no I/O.

This is the run's order of data: a function of the sources' shard sizes, their weights, the seed and the
position. `order` says which sample of a source, `mix` which source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.hashing import Int64s, key, sample_seed
from data_pipeline.mix import Mix
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
    """The samples of a run. `sizes[s][i]`: samples in shard i of source s; `weights`: shares by samples.

    There are no more streams than shards: a stream that is less than a shard would only keep samples that lie
    together from ever meeting in a batch.
    """

    def __init__(
        self,
        sizes: Sequence[Int64s],
        *,
        seed: int,
        streams: int,
        window: int,
        weights: Sequence[float] | None = None,
    ):
        self.seed = seed
        self.orders = [
            Order(size, seed=key(seed, number), streams=min(streams, len(size)), window=window)
            for number, size in enumerate(sizes)
        ]
        self.mix = Mix(weights or [1.0] * len(self.orders), seed=key(seed, 0x313))
        if len(self.mix) != len(self.orders):
            raise ValueError(f"{len(self.mix)} weights for {len(self.orders)} sources")
        counts = [order.samples for order in self.orders]
        self.samples = sum(counts)
        self._first_index = np.concatenate([[0], np.cumsum(counts)])
        self._first_stream = np.concatenate([[0], np.cumsum([order.streams for order in self.orders])])
        self._starts = [np.concatenate([[0], np.cumsum(order.sizes)]) for order in self.orders]

    def share(self, start: int, batch: int, world: int, rank: int) -> Draws:
        """Rank `rank`'s samples of the global batch that starts at position `start`.

        An equal cut in order of (source, stream), so that a rank reads mostly its own shards.
        """
        positions = np.arange(start, start + batch, dtype=np.int64)
        source, count = self.mix.take(positions)
        stream = np.empty_like(source)
        for number, order in enumerate(self.orders):
            mine = source == number
            stream[mine] = self._first_stream[number] + order.stream_of(count[mine])
        cut = rank_cut(stream, world, rank)
        return self._draws(source[cut], count[cut])

    def draws(self, positions: Int64s) -> Draws:
        """The samples at any positions."""
        return self._draws(*self.mix.take(positions))

    def counts(self, position: int) -> list[int]:
        """Samples of each source among the first `position`; over its size, the source's epochs."""
        return self.mix.counts(position)

    def _draws(self, source: Int64s, count: Int64s) -> Draws:
        epoch, shard, sample, index = (np.empty_like(count) for _ in range(4))
        for number, order in enumerate(self.orders):
            mine = source == number
            if not mine.any():
                continue
            places = order.take(count[mine])
            epoch[mine], shard[mine], sample[mine] = places.epoch, places.shard, places.sample
            index[mine] = self._starts[number][places.shard] + places.sample
        seed = sample_seed(self.seed, epoch, source, index)
        return Draws(source, epoch, shard, sample, index + self._first_index[source], seed)


def over_cap(plan: Plan, caps: Sequence[float | None], position: int) -> int | None:
    """The first source that `position` samples repeat beyond its cap, to be refused before training."""
    if not any(caps):
        return None
    for number, (cap, count, order) in enumerate(zip(caps, plan.counts(position), plan.orders, strict=True)):
        if cap is not None and count > cap * order.samples:
            return number
    return None
