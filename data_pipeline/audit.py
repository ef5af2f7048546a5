"""What a run has read: the pure order replayed up to its position, counted per source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.parallel import Progress
from data_pipeline.plan import Plan
from data_pipeline.quarantine import Broken

_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class SourceAudit:
    """The samples of one source that a run has consumed."""

    source: str
    samples: int  # in the source
    seen: int
    unique: int
    repeated: int  # seen - unique
    substituted: int  # of those seen, broken samples for which another stood in

    @property
    def epochs(self) -> float:
        return self.seen / self.samples


def audit(
    plan: Plan,
    names: Sequence[str],
    consumed: int,
    quarantine: Iterable[Broken] = (),
    progress: Progress | None = None,
) -> list[SourceAudit]:
    """Replay positions 0 to `consumed` of `plan`, whose sources are called `names`.

    Takes a byte a sample of the sources and about a tenth of a microsecond a position.
    """
    times = [np.zeros(order.samples, np.uint8) for order in plan.orders]
    seen, substituted = [0] * len(names), [0] * len(names)
    broken = np.unique(np.array([one.index for one in quarantine], np.int64))
    first = np.concatenate([[0], np.cumsum([order.samples for order in plan.orders])])
    for start in range(0, consumed, _AT_A_TIME):
        drawn = plan.draws(np.arange(start, min(start + _AT_A_TIME, consumed), dtype=np.int64))
        replaced = np.isin(drawn.index, broken)
        for number in range(len(names)):
            mine = drawn.source == number
            seen[number] += int(mine.sum())
            substituted[number] += int((mine & replaced).sum())
            times[number][drawn.index[mine] - first[number]] = 1
        if progress:
            progress(min(start + _AT_A_TIME, consumed), consumed)
    if seen != plan.counts(consumed):
        raise AssertionError(f"replayed {seen}, but the order's own counts are {plan.counts(consumed)}")
    uniques = [int(time.sum()) for time in times]
    return [
        SourceAudit(name, order.samples, count, unique, count - unique, changed)
        for name, order, count, unique, changed in zip(
            names, plan.orders, seen, uniques, substituted, strict=True
        )
    ]
