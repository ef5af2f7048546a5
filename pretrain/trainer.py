"""The loop. It names no method, no cluster and no library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.types import Batch
from pretrain.clock import Progress
from pretrain.health.health import Health
from pretrain.health.stopping import Stopping
from pretrain.objective import LossOutput, Objective
from pretrain.ports import BEYOND_STEPS, Engine, Listener, StepReport, StepSettings, StopReason


@dataclass(frozen=True)
class Trainer:
    """Everything one training loop needs, each part behind its port."""

    engine: Engine
    objective: Objective
    batches: Iterable[Batch]  # this rank's share of global batch t, t+1, ... without end
    batch_size: int  # global
    accumulate: Callable[[Engine, Batch, Progress], LossOutput]
    schedule: Callable[[Progress], StepSettings]
    stopping: Stopping
    health: Health
    listeners: Sequence[Listener]
    enter: Callable[[str], None] = lambda phase: None  # told what this rank does, for who watches it

    def fit(self, progress: Progress) -> tuple[Progress, StopReason]:
        """Train from `progress` to the end or until asked to stop; gives how far it came and why it left."""
        reason: StopReason = "done"
        for waited, batch in self._timed(progress):
            started = time.perf_counter()
            self.enter("forward and backward")
            output = self.accumulate(self.engine, batch, progress)
            busy = waited + time.perf_counter() - started
            self.enter("optimizer step")
            settings = self.schedule(progress)
            update = self.engine.step(settings)
            progress = progress.consumed(self.batch_size)

            if update is not None:
                progress = progress.applied()
                self.objective.after_step(update, progress, output)
            seconds = waited + time.perf_counter() - started
            self.enter(BEYOND_STEPS)
            if update is None:
                self.health.skipped(progress)
            else:
                report = StepReport(progress, output, update, settings, waited, seconds, busy)
                self.health.applied(report)
                for listener in self.listeners:
                    listener.after_step(report)

            if asked := self.stopping.due(progress):
                reason = "done" if progress.done else asked
                break
            if progress.done:
                break
        for listener in reversed(self.listeners):
            listener.finish(progress, reason)
        return progress, reason

    def _timed(self, progress: Progress) -> Iterator[tuple[float, Batch]]:
        """Batches with the seconds this rank waited for each."""
        if progress.done:
            return
        batches = iter(self.batches)
        while True:
            started = time.perf_counter()
            self.enter("waiting for data")
            batch = next(batches)
            yield time.perf_counter() - started, batch
