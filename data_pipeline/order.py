"""The order of samples as a pure function of one counter. No I/O, no torch, no state but caches.

A position counts the samples of one source since the start of the run. It falls in epoch `position // N`.
An epoch permutes the shards, cuts their concatenation into a fixed number of equal streams (which have
nothing to do with ranks or workers), permutes windows of each stream, and deals samples from the streams in
turn. So
- every epoch holds every sample exactly once, whatever the batch size: batches may straddle epochs;
- ranks, workers and restarts don't enter it: the one integer `position` is the whole state;
- a rank's equal cut of a batch, taken in order of streams, reads mostly its own shards;
- memory grows with the number of shards and the open windows, not with the number of samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.hashing import Int64s, key, permutation

ORDER_VERSION = 1
"""Frozen: any change of which sample stands at which position is a new version, recorded in checkpoints."""

_SHARDS, _WINDOW = 1, 2  # what a permutation is for: part of the hash


@dataclass(frozen=True)
class Places:
    """Where positions fall. Arrays of equal length, int64."""

    epoch: Int64s
    shard: Int64s  # number of the shard in the manifest
    sample: Int64s  # number of the sample in its shard


class Order:
    """The order of one source with `sizes[i]` samples in shard i."""

    def __init__(self, sizes: Sequence[int] | Int64s, *, seed: int, streams: int = 64, window: int = 4096):
        self.sizes = np.asarray(sizes, np.int64)
        self.samples = int(self.sizes.sum())
        if self.samples == 0 or streams < 1 or window < 1 or (self.sizes < 0).any():
            raise ValueError("an order needs samples, streams and a window, all positive")
        self.seed, self.streams, self.window = seed, streams, window
        self._epochs: OrderedDict[int, tuple[Int64s, Int64s]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], npt.NDArray[np.uint32]] = OrderedDict()
        self._kept = 8  # windows: twice as many as are asked for at a time, which is few on one of many ranks

    def take(self, positions: Int64s) -> Places:
        """The samples at `positions` (int64, >= 0, in any order)."""
        positions = np.asarray(positions, np.int64)
        epoch, within = np.divmod(positions, self.samples)
        shard, sample = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(epoch).tolist():
            chosen = epoch == number
            shard[chosen], sample[chosen] = self._take_in_epoch(number, within[chosen])
        return Places(epoch, shard, sample)

    def stream_of(self, positions: Int64s) -> Int64s:
        """The stream each position is dealt from."""
        return (positions % self.samples) % self.streams

    def shards_in_window(self) -> float:
        """How many shards are being read from at a time, on average, over all streams."""
        per_stream = min(self.window, max(1, self.samples // self.streams)) * len(self.sizes) / self.samples
        return min(float(len(self.sizes)), self.streams * (per_stream + 1))

    def _take_in_epoch(self, epoch: int, within: Int64s) -> tuple[Int64s, Int64s]:
        shards, ends = self._epoch(epoch)
        stream, offset = within % self.streams, within // self.streams
        shortest, longer = divmod(self.samples, self.streams)
        start = stream * shortest + np.minimum(stream, longer)
        length = shortest + (stream < longer)
        window = offset // self.window
        moved = np.empty_like(within)
        # One lookup per window touched: sorting groups the positions by (stream, window).
        group = np.lexsort((window, stream))
        bounds = np.flatnonzero(np.diff(stream[group]) | np.diff(window[group])) + 1
        self._kept = max(self._kept, 2 * (len(bounds) + 1))
        for members in np.split(group, bounds):
            first = members[0]
            c, k = int(stream[first]), int(window[first])
            size = min(self.window, int(length[first]) - k * self.window)
            moved[members] = k * self.window + self._window(epoch, c, k, size)[offset[members] % self.window]
        virtual = start + moved
        place = np.searchsorted(ends, virtual, side="right")
        found = shards[place]
        return found, virtual - (ends[place] - self.sizes[found])

    def _epoch(self, epoch: int) -> tuple[Int64s, Int64s]:
        """The epoch's order of shards and where each ends in it. Two are kept: a batch may straddle."""
        if epoch not in self._epochs:
            shards = permutation(key(self.seed, _SHARDS, epoch), len(self.sizes))
            self._epochs[epoch] = (shards, np.cumsum(self.sizes[shards]))
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, stream: int, window: int, size: int) -> npt.NDArray[np.uint32]:
        place = (epoch, stream, window)
        if place not in self._windows:
            drawn = permutation(key(self.seed, _WINDOW, epoch, stream, window), size)
            self._windows[place] = drawn.astype(np.uint32)
            while len(self._windows) > self._kept:
                self._windows.popitem(last=False)
        self._windows.move_to_end(place)
        return self._windows[place]


def rank_cut(groups: Int64s, world: int, rank: int) -> Int64s:
    """Which elements of a global batch rank `rank` of `world` takes: an equal cut, in order of `groups`.

    `groups` (G,) int64 is each position's stream; positions of one stream stay together and in order. G must
    be a multiple of `world`.
    """
    if len(groups) % world:
        raise ValueError(f"a global batch of {len(groups)} can't be cut into {world} equal parts")
    share = len(groups) // world
    return np.argsort(groups, kind="stable")[rank * share : (rank + 1) * share]


def rank_positions(order: Order, start: int, batch: int, world: int, rank: int) -> Int64s:
    """The positions in the global batch [start, start + batch) that one rank takes, int64."""
    positions = np.arange(start, start + batch, dtype=np.int64)
    return positions[rank_cut(order.stream_of(positions), world, rank)]
