"""Lines keep what they thin, axes have round ticks, labels don't lie on each other."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pretrain.report.curves import POINTS, UNKNOWN, Axis, area, axis_over, path, short, spread, thinned


def test_a_million_rows_become_few_and_no_spike_is_lost() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(1, 1_000_001) * 256.0, rng.normal(size=1_000_000)
    y[[123_456, 777_777]] = 1000.0, -1000.0
    began = time.process_time()  # of this process alone, whatever else the machine does
    line = thinned("run", 0, x, y)
    assert line is not None and time.process_time() - began < 5
    assert len(line.x) == POINTS
    assert np.nanmax(line.high) == 1000 and np.nanmin(line.low) == -1000
    assert (np.diff(line.x) > 0).all() and (line.x[0], line.x[-1]) == (x[0], x[-1])
    by_hand = y.reshape(POINTS, -1) if 1_000_000 % POINTS == 0 else np.array_split(y, POINTS)
    means = np.array([part.mean() for part in by_hand])
    assert np.corrcoef(means, line.y)[0, 1] > 0.99


def test_few_rows_stay_as_they_are() -> None:
    line = thinned("run", 0, np.array([1.0, 2, 3]), np.array([5.0, np.nan, 4]))
    assert line is not None
    assert line.x.tolist() == [1, 2, 3] and line.lost == 1 and line.last == 4
    np.testing.assert_array_equal(line.y, [5, np.nan, 4])
    np.testing.assert_array_equal(line.low, line.high)


def test_what_is_not_finite_breaks_the_line_and_nothing_else() -> None:
    x, y = np.arange(1000.0), np.ones(1000)
    y[:500], y[500] = np.nan, np.inf
    line = thinned("run", 0, x, y, points=10)
    assert line is not None and line.lost == 501
    assert np.isnan(line.y[:5]).all() and (line.y[5:] == 1).all() and (line.high[5:] == 1).all()
    assert thinned("run", 0, x, np.full(1000, np.nan)) is None
    assert path(np.array([0.0, 1, 2, 3]), np.array([1, np.nan, 2, 3])) == "M0.0 1.0h0.1M2.0 2.0L3.0 3.0"
    assert area(np.array([0.0, 1]), np.array([0.0, 0]), np.array([1.0, np.nan])) == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 6.7), (-3, 12_345), (1e-9, 3e-9), (99.2, 99.9)])
def test_ticks_are_round_within_the_axis_and_few(low: float, high: float) -> None:
    ticks = Axis(low, high).ticks()
    assert 3 <= len(ticks) <= 8
    slack = (high - low) * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
    assert f"{steps[0]:.6e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


def test_a_logarithmic_axis_where_it_helps() -> None:
    falling = thinned("run", 0, np.arange(1.0, 101), np.geomspace(1e4, 1e-2, 100))
    flat = thinned("run", 0, np.arange(1.0, 101), np.ones(100))
    assert falling is not None and flat is not None
    axis = axis_over([falling])
    assert axis.log and axis.place(np.array([axis.low, axis.high])).tolist() == [0, 1]
    assert all(np.log10(tick) == round(np.log10(tick)) for tick in axis.ticks()) and len(axis.ticks()) >= 3
    assert not axis_over([flat]).log and axis_over([flat]).low < 1 < axis_over([flat]).high
    assert axis_over([flat], zero=True).low == 0


def test_labels_keep_their_distance_and_their_order() -> None:
    found = spread([0.5, 0.51, 0.98, 0.99, 0.1], 0.1)
    assert np.argsort(found).tolist() == [4, 0, 1, 2, 3]
    assert np.diff(sorted(found)).min() > 0.0999 and max(found) <= 1 and found[4] == 0.1
    crowded = spread([0.5] * 30, 0.1)
    assert min(crowded) > -1e-9 and max(crowded) < 1 + 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12_800_000_000, "12.8G"), (51_200, "51.2k"), (9_000, "9000"), (0.0005, "0.0005"),
     (4.5e-5, "4.5e-5"), (-2_500_000, "-2.5M"), (999_999, "1M"), (float("nan"), UNKNOWN)],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
