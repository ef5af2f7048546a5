"""How many runs become job arrays that the site takes, with no more of them at work than were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Array:
    """One submission: the runs from `start` to before `stop`."""

    start: int
    stop: int
    parallel: int  # of them at a time
    after: int | None = None  # place of the array that has to end first

    def __len__(self) -> int:
        return self.stop - self.start


def arrays(count: int, limit: int | None, parallel: int) -> Sequence[Array]:
    """`count` runs in arrays of at most `limit` (MaxArraySize; None where it isn't known).

    All arrays together run `parallel` at a time: they share it, and where there are more arrays than that,
    some wait for the end of others.
    """
    size = count if limit is None else max(1, limit)
    number = max(1, -(-count // size))
    lanes = min(number, parallel)
    bounds = [count * each // number for each in range(number + 1)]  # as equal as can be
    return [
        Array(
            start=bounds[each],
            stop=bounds[each + 1],
            parallel=parallel // lanes + (each % lanes < parallel % lanes),
            after=each - lanes if each >= lanes else None,
        )
        for each in range(number)
    ]
