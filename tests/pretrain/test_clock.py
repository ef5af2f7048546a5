"""Durations and the clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.clock import Duration, Progress


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 steps", Duration(12, "steps")),
        ("100_000 steps", Duration(100_000, "steps")),
        ("800 epochs", Duration(800, "epochs")),
        ("12.8e9 samples", Duration(12.8e9, "samples")),
        ("30 min", Duration(30, "min")),
        ("0.5 epoch", Duration(0.5, "epochs")),
    ],
)
def test_parse(text: str, expected: Duration) -> None:
    assert Duration.parse(text) == expected
    assert Duration.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "12", "steps", "12 parsecs", "-1 steps", "nan steps", "inf epochs", "1e999 steps"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a duration reads"):
        Duration.parse(text)


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 1000))
def test_steps_cover_every_sample_and_no_more_than_a_batch_extra(epochs: int, batch: int, size: int) -> None:
    steps = Duration(epochs, "epochs").steps(batch, size)
    assert epochs * size <= steps * batch < epochs * size + batch
    assert Duration(steps, "steps").steps(batch, size) == steps


def test_minutes_have_no_steps() -> None:
    with pytest.raises(ValueError, match="minutes"):
        Duration(3, "min").steps(8, 100)


def test_a_skipped_update_moves_the_data_but_not_the_clock() -> None:
    start = Progress(step=3, samples=24, total_steps=6, dataset_size=12)
    skipped = start.consumed(8)
    assert (skipped.step, skipped.samples, skipped.epoch) == (3, 32, 32 / 12)
    assert skipped.applied().fraction == 4 / 6
    assert not skipped.done and skipped.applied().applied().applied().done
