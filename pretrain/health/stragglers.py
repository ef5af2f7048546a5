"""Who holds the others up: what each rank did by itself, gathered now and then."""

from __future__ import annotations

import json
import logging
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.files import write_atomically
from pretrain import collectives
from pretrain.clock import Progress
from pretrain.ports import StepReport, StopReason

log = logging.getLogger(__name__)

SLOW, LEAST = 1.5, 0.02
"""A rank is slow that takes so many times the median, and so many seconds more."""


@dataclass(frozen=True)
class Pace:
    """Means of one rank over the steps since the row before, in seconds."""

    rank: int
    node: str
    step: float  # the whole step: nearly the same on every rank, since they wait for each other
    busy: float  # of it, waiting for data, forward and backward: where a slow rank differs
    data_wait: float


class Stragglers:
    """A listener of every rank, which acts at the steps that have a row of metrics.

    RUN/stragglers.json holds the last table, sorted by node; `tell` hears the slowest rank on rank 0.
    Forward and backward are measured on the host: on a GPU they end when the work is queued, so that there
    a slow device shows in its peers' waiting, and a slow loader in `data_wait`.
    """

    def __init__(
        self, every_steps: int, root: Path, tell: Callable[[Progress, Mapping[str, float]], None]
    ) -> None:
        self.every, self.file, self.tell = max(1, every_steps), root / "stragglers.json", tell
        self.steps, self.sums = 0, [0.0, 0.0, 0.0]
        self.named: tuple[int, ...] = ()
        names: list[str] = [platform.node()] * collectives.ranks()
        if collectives.ranks() > 1:
            dist.all_gather_object(names, platform.node())
        self.nodes = names

    def after_step(self, report: StepReport) -> None:
        self.steps += 1
        for place, seconds in enumerate((report.seconds, report.busy, report.data_wait)):
            self.sums[place] += seconds
        if report.progress.step % self.every == 0 and collectives.ranks() > 1:
            self._gather(report)

    def finish(self, progress: Progress, reason: StopReason) -> None:
        """Nothing is left to do."""

    def _gather(self, report: StepReport) -> None:
        means = torch.tensor([each / self.steps for each in self.sums])
        self.steps, self.sums = 0, [0.0, 0.0, 0.0]
        rows = collectives.gather_uneven(means.to(report.output.loss.device)[None]).tolist()
        if collectives.rank() != 0:
            return
        paces = [Pace(rank, self.nodes[rank], *row) for rank, row in enumerate(rows)]
        worst = max(paces, key=lambda pace: pace.busy)
        self.tell(
            report.progress,
            {"slowest_rank": worst.rank, "slowest_busy": worst.busy, "slowest_data_wait": worst.data_wait},
        )
        self._write(report.progress, paces)
        self._warn(paces)

    def _write(self, progress: Progress, paces: Sequence[Pace]) -> None:
        table: dict[str, list[dict[str, object]]] = {}
        for pace in paces:
            table.setdefault(pace.node, []).append(
                {name: value for name, value in asdict(pace).items() if name != "node"}
            )
        content = {"step": progress.step, "nodes": dict(sorted(table.items()))}
        write_atomically(self.file, json.dumps(content, indent=1) + "\n")

    def _warn(self, paces: Sequence[Pace]) -> None:
        """Say who is slow, once as long as it is the same ranks."""
        usual = statistics.median(pace.busy for pace in paces)
        slow = [pace for pace in paces if pace.busy > max(SLOW * usual, usual + LEAST)]
        ranks = tuple(pace.rank for pace in slow)
        if slow and ranks != self.named:
            each = (
                f"rank {pace.rank} on {pace.node} {pace.busy:.2f} s (data {pace.data_wait:.2f} s)"
                for pace in sorted(slow, key=lambda pace: -pace.busy)[:5]
            )
            log.warning("slow, where the median rank takes %.2f s a step: %s", usual, "; ".join(each))
        self.named = ranks
