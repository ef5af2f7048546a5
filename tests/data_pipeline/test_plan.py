"""Mixing and the whole plan: exact shares, every source's own epochs, the same for any ranks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mix import Mix
from data_pipeline.plan import Draws, Plan

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(weights=WEIGHTS, seed=st.integers(0, 2**63), block=st.integers(1, 300), first=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_shares_are_exact_to_a_sample(weights: list[float], seed: int, block: int, first: int) -> None:
    """After any block each source is within one sample of weight times positions (weights kept to 2**-32)."""
    mix = Mix(weights, seed=seed, block=block)
    total = sum(Fraction(weight) for weight in weights)
    for number in (1, 7, first):
        position = number * mix.block
        for weight, count in zip(weights, mix.counts(position), strict=True):
            rounding = Fraction(position, 2**32)
            assert abs(count - Fraction(weight) / total * position) < 1 + rounding


@given(weights=WEIGHTS, seed=st.integers(0, 2**63), block=st.integers(1, 64), start=st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_counts_and_takes_agree(weights: list[float], seed: int, block: int, start: int) -> None:
    mix = Mix(weights, seed=seed, block=block)
    positions = np.arange(start, start + 150)
    source, count = mix.take(positions)
    before = mix.counts(start)
    for number in range(len(weights)):
        mine = count[source == number]
        assert mine.tolist() == list(range(before[number], before[number] + len(mine)))
        assert mix.counts(start + 150)[number] == before[number] + len(mine)
    shuffled = np.random.default_rng(0).permutation(positions)
    again = Mix(weights, seed=seed, block=block).take(shuffled)
    assert np.array_equal(again[0], source[shuffled - start])


SOURCES = st.lists(
    st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0),
    min_size=1,
    max_size=4,
)


@given(
    sizes=SOURCES, seed=st.integers(0, 2**31), weights=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    worlds=st.tuples(st.integers(1, 16), st.integers(1, 16)), share=st.integers(1, 9),
    start=st.integers(0, 10**7),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_a_mix_is_the_same_for_any_ranks_and_restarts(
    sizes: list[list[int]], seed: int, weights: list[float], worlds: tuple[int, int], share: int, start: int
) -> None:
    def plan() -> Plan:
        arrays = [np.array(shards, np.int64) for shards in sizes]
        return Plan(arrays, seed=seed, streams=5, window=9, weights=weights[: len(sizes)])

    at, taken = start, []
    for world in worlds:
        fresh = plan()
        for _ in range(2):
            parts = [fresh.share(at, world * share, world, rank) for rank in range(world)]
            assert {len(part) for part in parts} == {share}
            taken.append(np.concatenate([part.rows() for part in parts]))
            at += world * share
    whole = plan().draws(np.arange(start, at)).rows()
    assert np.array_equal(np.sort(np.concatenate(taken), axis=0), np.sort(whole, axis=0))
    assert len(np.unique(np.concatenate(taken), axis=0)) == len(whole)


def test_every_source_has_epochs_of_its_own() -> None:
    plan = Plan([np.array([10, 20]), np.array([7])], seed=1, streams=4, window=8, weights=[3, 1])
    drawn = plan.draws(np.arange(4096 * 2))
    counts = plan.counts(4096 * 2)
    assert counts == [6144, 2048] == np.bincount(drawn.source).tolist()
    for number, size in enumerate((30, 7)):
        mine = drawn.source == number
        for epoch in range(counts[number] // size):
            index = drawn.index[mine][drawn.epoch[mine] == epoch]
            assert sorted(index.tolist()) == list(range(30 * number, 30 * number + size))
    assert len(np.unique(drawn.seed)) == len(drawn)


def test_sources_arent_bunched() -> None:
    source, _ = Mix([1, 1], seed=0).take(np.arange(40_960))
    runs = np.diff(np.flatnonzero(np.diff(source)))
    assert runs.max() < 25 and abs(runs.mean() - 2) < 0.1


def test_one_source_is_dealt_in_order() -> None:
    source, count = Mix([5], seed=0).take(np.array([5, 3, 10**12]))
    assert source.tolist() == [0, 0, 0] and count.tolist() == [5, 3, 10**12]
    assert Mix([5], seed=0).counts(10**12 + 1) == [10**12 + 1]


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [float("inf")], [float("nan")]])
def test_wrong_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive weights"):
        Mix(weights, seed=0)


def test_a_rare_source_gets_larger_blocks() -> None:
    mix = Mix([1, 1e-5], seed=0)
    assert 100_000 < mix.block < 101_000
    source, _ = mix.take(np.arange(10 * mix.block))
    assert (source == 1).sum() in (10, 11)
    with pytest.raises(ValueError, match="can't be kept"):
        Mix([1, 1e-8], seed=0)


def test_rows_come_back() -> None:
    drawn = Plan([np.array([5])], seed=1, streams=4, window=8).share(3, 6, 2, 1)
    again = Draws.from_rows(np.frombuffer(drawn.rows().tobytes(), np.int64).reshape(-1, 6))
    assert np.array_equal(again.rows(), drawn.rows())
