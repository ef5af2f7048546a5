"""Which source each position of a run is dealt from, in closed form. Pure numpy, no state but a cache.

Positions come in blocks. A source's share of the first n positions is its weight times n, rounded down along
the list of sources, so after every block each source is within one sample of its exact share; inside a block
the slots are permuted. Weights are fixed-point integers: no rounding differs between machines.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data_pipeline.hashing import Int64s, key, permutation

_SCALE = 1 << 32
_LARGEST_BLOCK = 1 << 20
_BLOCK = 3  # what the permutation is for: part of the hash


class Mix:
    """Deals positions to sources by weight.

    Blocks have `block` positions, or as many as it takes for the rarest source to have one of its own: with
    less its rounded count could go down from one block to the next.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, block: int = 4096):
        if not weights or block < 1 or any(not 0 < weight < float("inf") for weight in weights):
            raise ValueError("a mix needs positive weights and a positive block")
        exact = [Fraction(weight) for weight in weights]
        total, so_far = sum(exact), Fraction(0)
        self.cumulated = [0]  # of _SCALE, before each source and after the last
        for weight in exact:
            so_far += weight
            self.cumulated.append(round(so_far / total * _SCALE))
        rarest = min(after - before for before, after in itertools.pairwise(self.cumulated))
        if rarest * _LARGEST_BLOCK < _SCALE:
            raise ValueError(f"a weight below 1/{_LARGEST_BLOCK} of the sum can't be kept")
        self.seed, self.block = seed, max(block, -(-_SCALE // rarest))
        self._blocks: OrderedDict[int, tuple[Int64s, Int64s]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.cumulated) - 1

    def take(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """For each position: its source, and how many samples of that source came before it."""
        positions = np.asarray(positions, np.int64)
        if len(self) == 1:
            return np.zeros_like(positions), positions
        source, count = np.empty_like(positions), np.empty_like(positions)
        block, within = np.divmod(positions, self.block)
        for number in np.unique(block).tolist():
            chosen = block == number
            sources, counts = self._block(number)
            source[chosen], count[chosen] = sources[within[chosen]], counts[within[chosen]]
        return source, count

    def counts(self, position: int) -> list[int]:
        """Samples of each source among the first `position` positions."""
        block, within = divmod(position, self.block)
        before = self._at(block)
        if within == 0 or len(self) == 1:
            return before if within == 0 else [position]
        sources, _ = self._block(block)
        partial = np.bincount(sources[:within], minlength=len(self)).tolist()
        return [a + b for a, b in zip(before, partial, strict=True)]

    def _at(self, block: int) -> list[int]:
        """Samples of each source before a block."""
        ends = [cumulated * block * self.block // _SCALE for cumulated in self.cumulated]
        return [after - before for before, after in itertools.pairwise(ends)]

    def _block(self, number: int) -> tuple[Int64s, Int64s]:
        if number not in self._blocks:
            before, after = self._at(number), self._at(number + 1)
            slots = [end - start for start, end in zip(before, after, strict=True)]
            sources = np.repeat(np.arange(len(self), dtype=np.int64), slots)
            sources = sources[permutation(key(self.seed, _BLOCK, number), self.block)]
            counts = np.empty(self.block, np.int64)
            for source, first in enumerate(before):
                mine = sources == source
                counts[mine] = first + np.arange(int(mine.sum()))
            self._blocks[number] = (sources, counts)
            while len(self._blocks) > 4:
                self._blocks.popitem(last=False)
        return self._blocks[number]
