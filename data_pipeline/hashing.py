"""Counter-based integer hashing in numpy: every random choice of the pipeline comes from here.

A hash has no state to save, gives the same numbers on every machine and numpy version (numpy promises that of
its raw bit generators only, not of `permutation`), and any element can be computed alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

# The finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators",
# fig. 17, with the constants of Stafford's variant 13): a bijection of 64-bit words.
GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)

_MASK = (1 << 64) - 1
_G = np.uint64(GOLDEN)
_F0, _F1 = (np.uint64(factor) for factor in FACTORS)
_S0, _S1, _S2 = (np.uint64(shift) for shift in SHIFTS)


def mixed(words: UInt64s) -> UInt64s:
    """Scramble 64-bit words, one to one."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> _S0)) * _F0
        words = (words ^ (words >> _S1)) * _F1
        return words ^ (words >> _S2)


def folded(state: UInt64s, words: UInt64s) -> UInt64s:
    """Take one more word into each hash state; for a fixed state this is one to one in the word."""
    with np.errstate(over="ignore"):
        return mixed((state ^ words) + _G)


def key(*words: int) -> int:
    """A 64-bit hash of a few integers of any sign, for instance (seed, purpose, epoch)."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = folded(state, np.array([word & _MASK], np.uint64))
    return int(state[0])


def stream(state: int, count: int) -> UInt64s:
    """`count` pseudorandom 64-bit words that belong to `state`."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * _G
        return mixed(np.uint64(state) + steps)


def permutation(state: int, count: int) -> Int64s:
    """A pseudorandom order of range(count) that belongs to `state`.

    `stream` never repeats a word, so there are no ties and any sorting algorithm gives the same order.
    """
    return np.argsort(stream(state, count))


def sample_seed(seed: int, epoch: Int64s | int, source: Int64s | int, index: Int64s | int) -> Int64s:
    """The seed of one sample in one epoch, int64, vectorised by broadcasting.

    `index` is the sample's number in its source's manifest. For a fixed seed, epoch and source no two samples
    share a seed.
    """
    run = np.array(key(seed, 0x5EED), np.uint64)
    epochs, sources, indices = np.broadcast_arrays(
        *(np.asarray(word, np.int64).view(np.uint64) for word in (epoch, source, index))
    )
    return folded(folded(folded(run, sources), epochs), indices).view(np.int64)


def uniform(seeds: Int64s, purpose: int, count: int) -> npt.NDArray[np.float32]:
    """(B, count) float32 in [0, 1): the numpy twin of `randomness.uniform`, equal to the last bit."""
    with np.errstate(over="ignore"):
        state = folded(seeds.view(np.uint64), np.array(purpose, np.uint64))
        steps = np.arange(1, count + 1, dtype=np.uint64) * _G
        words = mixed(state[:, None] + steps[None, :])
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
