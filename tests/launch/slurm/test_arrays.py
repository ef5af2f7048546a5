"""Runs in job arrays of a size that the site takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.slurm.arrays import Array, arrays


@pytest.mark.parametrize(
    ("count", "limit", "parallel", "expected"),
    [
        (6, None, 2, [Array(0, 6, 2)]),
        (6, 1001, 2, [Array(0, 6, 2)]),
        (1, 1, 4, [Array(0, 1, 4)]),
        (6, 5, 4, [Array(0, 3, 2), Array(3, 6, 2)]),
        (6, 5, 3, [Array(0, 3, 2), Array(3, 6, 1)]),
        (6, 5, 1, [Array(0, 3, 1), Array(3, 6, 1, after=0)]),
        (7, 2, 3, [Array(0, 1, 1), Array(1, 3, 1), Array(3, 5, 1), Array(5, 7, 1, after=0)]),
        (2, 0, 1, [Array(0, 1, 1), Array(1, 2, 1, after=0)]),
    ],
)
def test_they_are_cut_and_share_what_may_run_at_once(
    count: int, limit: int | None, parallel: int, expected: list[Array]
) -> None:
    assert arrays(count, limit, parallel) == expected


@given(st.integers(1, 3000), st.integers(1, 1200), st.integers(1, 40))
def test_every_run_is_in_one_array_and_no_more_run_than_were_asked_for(
    count: int, limit: int, parallel: int
) -> None:
    found = arrays(count, limit, parallel)
    assert [n for each in found for n in range(each.start, each.stop)] == list(range(count))
    assert all(1 <= len(each) <= limit and each.parallel >= 1 for each in found)
    waiting = {each.after for each in found if each.after is not None}
    assert all(after < place for place, each in enumerate(found) if (after := each.after) is not None)
    assert len(waiting) == sum(each.after is not None for each in found)  # nobody is waited for twice
    # At any time one array of each chain is at work: at most the widest of each.
    chains: dict[int, int] = {}
    lanes: dict[int, int] = {}
    for place, each in enumerate(found):
        lanes[place] = place if each.after is None else lanes[each.after]
        chains[lanes[place]] = max(chains.get(lanes[place], 0), each.parallel)
    assert sum(chains.values()) == (parallel if len(found) > 1 else found[0].parallel)
