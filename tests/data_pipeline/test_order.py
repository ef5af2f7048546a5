"""The order: every sample once an epoch, the same for any ranks, cheap anywhere, frozen."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import ORDER_VERSION, Order, rank_cut, rank_positions

SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=50).filter(lambda sizes: sum(sizes) > 0)
SEEDS, STREAMS, WINDOWS = st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(1, 400)


def pairs(order: Order, positions: np.ndarray) -> list[tuple[int, int, int]]:
    places = order.take(positions)
    return list(zip(places.epoch.tolist(), places.shard.tolist(), places.sample.tolist(), strict=True))


@given(sizes=SIZES, seed=SEEDS, streams=STREAMS, window=WINDOWS, epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_sample_once(
    sizes: list[int], seed: int, streams: int, window: int, epoch: int
) -> None:
    order = Order(sizes, seed=seed, streams=streams, window=window)
    n = order.samples
    seen = pairs(order, np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(seen) == [(epoch, shard, i) for shard, size in enumerate(sizes) for i in range(size)]


@given(
    sizes=SIZES, seed=SEEDS, streams=STREAMS, window=WINDOWS,
    ranks=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    share=st.integers(1, 8), start=st.integers(0, 10**9), stop=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_other_ranks_and_batches_go_on_with_the_very_same_samples(
    sizes: list[int],
    seed: int,
    streams: int,
    window: int,
    ranks: tuple[int, int],
    share: int,
    start: int,
    stop: int,
) -> None:
    """Some steps on a number of ranks, a kill, the rest on another number with another batch size."""
    order = Order(sizes, seed=seed, streams=streams, window=window)
    at, taken = start, []
    for world in ranks:
        fresh = Order(sizes, seed=seed, streams=streams, window=window)
        for _ in range(stop):
            cuts = [rank_positions(fresh, at, world * share, world, rank) for rank in range(world)]
            batch = np.concatenate(cuts)
            assert sorted(batch.tolist()) == list(range(at, at + world * share))
            taken += [place for cut in cuts for place in pairs(fresh, cut)]
            at += world * share
    assert sorted(taken) == sorted(pairs(order, np.arange(start, at)))


@given(sizes=SIZES, seed=SEEDS, positions=st.lists(st.integers(0, 10**12), min_size=1, max_size=50))
@settings(max_examples=40, deadline=None)
def test_a_position_is_the_same_alone_or_in_company(
    sizes: list[int], seed: int, positions: list[int]
) -> None:
    order = Order(sizes, seed=seed, streams=7, window=16)
    together = pairs(order, np.array(positions))
    alone = [pairs(Order(sizes, seed=seed, streams=7, window=16), np.array([p]))[0] for p in positions]
    assert together == alone


def test_epochs_and_seeds_differ() -> None:
    orders = [Order([500] * 20, seed=seed, streams=8, window=256) for seed in (0, 1)]
    first, second = pairs(orders[0], np.arange(10_000)), pairs(orders[0], np.arange(10_000, 20_000))
    other = pairs(orders[1], np.arange(10_000))
    for a, b in ((first, second), (first, other)):
        assert sum(x[1:] == y[1:] for x, y in zip(a, b, strict=True)) < 20


def test_a_rank_keeps_to_its_own_streams_where_the_counts_divide() -> None:
    order = Order([100] * 64, seed=3, streams=16, window=50)
    for step in range(20):
        for rank in range(4):
            mine = rank_positions(order, step * 64, 64, 4, rank)
            assert set(order.stream_of(mine).tolist()) == set(range(4 * rank, 4 * rank + 4))


def test_neighbours_in_a_shard_are_far_apart_in_the_order() -> None:
    order = Order([1000] * 16, seed=1, streams=4, window=512)
    places = order.take(np.arange(4000))
    same = (places.shard[4:] == places.shard[:-4]) & (np.abs(places.sample[4:] - places.sample[:-4]) == 1)
    assert same.mean() < 0.02


def test_unequal_cuts_are_refused() -> None:
    with pytest.raises(ValueError, match="can't be cut into 3"):
        rank_cut(np.zeros(10, np.int64), 3, 0)


def test_the_order_is_frozen() -> None:
    assert ORDER_VERSION == 1
    order = Order([3, 5, 4], seed=2, streams=2, window=3)
    assert [place[1:] for place in pairs(order, np.arange(13))] == [
        (0, 2),
        (2, 0),
        (0, 0),
        (1, 4),
        (0, 1),
        (1, 3),
        (1, 2),
        (2, 1),
        (1, 0),
        (2, 2),
        (1, 1),
        (2, 3),
        (2, 1),
    ]


def test_two_billion_samples_on_4096_ranks() -> None:
    """Some ranks at some steps, cold, and one through many: right, quick, in the benchmark's memory."""
    world, batch, sizes = 4096, 65_536, np.full(200_000, 10_000)
    total = int(sizes.sum())
    tracemalloc.start()
    started = time.perf_counter()
    order = Order(sizes, seed=5, streams=world, window=4096)
    for start in (0, 1_234_567_891, total - batch // 2, 7 * total + 12_345):  # the third straddles epochs
        ranks = (0, 1, 2047, 4095)
        shares = [rank_positions(order, start, batch, world, rank) for rank in ranks]
        assert [len(share) for share in shares] == [16] * 4
        assert len(np.unique(np.concatenate(shares))) == 64
        for share in shares:
            places = order.take(share)
            assert share.min() >= start and share.max() < start + batch
            assert (places.epoch == share // total).all() and (places.sample < 10_000).all()
            assert len(np.unique(order.stream_of(share))) <= (2 if start % world else 1)
    seconds = time.perf_counter() - started
    for step in range(0, 200_000, 1000):  # one rank, far into its epoch
        order.take(rank_positions(order, step * batch, batch, world, 4095))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 20 and peak < 100e6  # the benchmark measures; this only guards the order of magnitude


def test_all_ranks_together_are_the_batch_at_scale() -> None:
    """Every one of 4,096 ranks over 200,000 shards, by the streams alone."""
    order = Order(np.full(200_000, 10_000), seed=5, streams=64, window=4096)
    start, batch, world = 1_999_990_000, 16_384, 4096  # straddles
    positions = np.arange(start, start + batch)
    whole = np.argsort(order.stream_of(positions), kind="stable").reshape(world, 4)
    for rank in (0, 1, 999, 4095):
        assert np.array_equal(rank_positions(order, start, batch, world, rank), positions[whole[rank]])
    assert np.array_equal(np.sort(whole, axis=None), np.arange(batch))
    places = order.take(positions)
    assert (
        len({*zip(places.epoch.tolist(), places.shard.tolist(), places.sample.tolist(), strict=True)})
        == batch
    )
