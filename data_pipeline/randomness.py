"""Random numbers that belong to samples: stateless, equal on every device and for any cut of a batch.

`uniform` is what masks and device-side augmentation draw from. Each purpose has a number in `Purpose`, so
that two users of the same sample never see the same numbers.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from data_pipeline.hashing import FACTORS, GOLDEN, SHIFTS, sample_seed

__all__ = ["Purpose", "sample_seed", "uniform"]


class Purpose(enum.IntEnum):
    """What random numbers are for. Numbers are never reused or changed; objectives take 1000 and up.

    A view's own purposes are `purpose + STRIDE * view`.
    """

    CROP = 1
    FLIP = 2
    CAPTION = 3
    SUBSTITUTE = 4
    JITTER = 5
    GRAYSCALE = 6
    BLUR = 7
    SOLARIZE = 8
    ROTATE = 9
    MASK = 1000


STRIDE = 1 << 20


def uniform(seeds: Tensor, purpose: int, count: int) -> Tensor:
    """(B, count) float32 in [0, 1) for `seeds` (B,) int64, on the seeds' device.

    Row b depends on `seeds[b]`, `purpose` and the column alone, and is the same bits on CPU and GPU. 24
    random bits a number. The hash is SplitMix64's finaliser over a counter (see `hashing`).
    """
    state = _mixed((seeds ^ purpose) + _signed(GOLDEN))
    steps = torch.arange(1, count + 1, dtype=torch.int64, device=seeds.device) * _signed(GOLDEN)
    words = _mixed(state[:, None] + steps[None, :])
    return _shifted(words, 40).to(torch.float32) * 2.0**-24


def _mixed(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, SHIFTS[0])) * _signed(FACTORS[0])
    words = (words ^ _shifted(words, SHIFTS[1])) * _signed(FACTORS[1])
    return words ^ _shifted(words, SHIFTS[2])


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's shift of int64 copies the sign, so its bits are masked away."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
