"""Random numbers belong to samples: same bits for any cut, in numpy and torch; independent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import hashing
from data_pipeline.randomness import Purpose, sample_seed, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


def test_the_hash_is_frozen() -> None:
    """Changing it changes every run's data: these values may only change with ORDER_VERSION."""
    assert hashing.key(1, -2, 3) == 0xA751334A06F3C6C3
    assert sample_seed(7, 1, 0, np.arange(3)).tolist() == [
        -8350222554671692593,
        32326784363339083,
        -4425364187059993007,
    ]
    assert hashing.permutation(5, 8).tolist() == [3, 4, 2, 5, 0, 7, 1, 6]


@given(seeds=st.lists(INT64, min_size=1, max_size=20), purpose=st.integers(0, 2**40), cut=st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_a_row_depends_on_its_seed_alone(seeds: list[int], purpose: int, cut: int) -> None:
    whole = torch.tensor(seeds)
    drawn = uniform(whole, purpose, 5)
    assert drawn.dtype == torch.float32 and drawn.shape == (len(seeds), 5)
    assert bool((drawn >= 0).all() and (drawn < 1).all())
    parts = torch.cat([uniform(whole[:cut], purpose, 5), uniform(whole[cut:], purpose, 5)])
    assert torch.equal(drawn, parts)
    assert torch.equal(drawn[:, :3], uniform(whole, purpose, 3))
    assert np.array_equal(drawn.numpy(), hashing.uniform(np.array(seeds, np.int64), purpose, 5))


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits() -> None:
    seeds = torch.from_numpy(sample_seed(1, 0, 0, np.arange(4096)))
    assert torch.equal(uniform(seeds, 3, 64), uniform(seeds.cuda(), 3, 64).cpu())


def test_sample_seeds_differ_over_samples_epochs_sources_and_runs() -> None:
    index = np.arange(20_000)
    seeds = [
        sample_seed(run, epoch, source, index) for run in (0, 1) for epoch in (0, 1) for source in (0, 1)
    ]
    assert len(np.unique(np.concatenate(seeds))) == 8 * len(index)


def chi_square(values: np.ndarray, bins: int) -> float:
    """Normal score of the chi-square statistic for equal bins."""
    counts, _ = np.histogram(values, bins, (0, 1))
    expected = len(values) / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (bins - 1)) / (2 * (bins - 1)) ** 0.5


def test_numbers_are_uniform_and_independent() -> None:
    """Neighbouring samples, columns and purposes: regular inputs are where a weak hash shows."""
    seeds = torch.from_numpy(sample_seed(0, 0, 0, np.arange(4000)))
    a, b = uniform(seeds, Purpose.CROP, 50).numpy(), uniform(seeds, Purpose.FLIP, 50).numpy()
    raw = uniform(torch.arange(4000), 0, 50).numpy()
    for values in (a, b, raw, a[:, 0], a[0], raw[:, 0]):
        assert abs(chi_square(values.ravel(), 50)) < 4
    for x, y in ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (raw[1:], raw[:-1])):
        n = x.size
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 4.5 / n**0.5
        pairs, _, _ = np.histogram2d(x.ravel(), y.ravel(), 16, ((0, 1), (0, 1)))
        score = (((pairs - n / 256) ** 2 / (n / 256)).sum() - 255) / 510**0.5
        assert abs(score) < 4.5


def test_permutations_are_fair() -> None:
    """Every element is as likely at every place."""
    places = np.stack([hashing.permutation(hashing.key(9, k), 6) for k in range(6000)])
    counts = np.stack([np.bincount(places[:, column], minlength=6) for column in range(6)])
    assert np.abs(counts - 1000).max() < 4.5 * (1000 * 5 / 6) ** 0.5
