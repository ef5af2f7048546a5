"""The loop, with every port a small fake: order of calls, skipped updates, stopping."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from data_pipeline.types import Batch
from pretrain.accumulation import SumOfMicroBatches
from pretrain.clock import Duration, Progress
from pretrain.health.health import Health, HealthConfig, TroubleError
from pretrain.health.stopping import Stopping, StopRequest
from pretrain.objective import LossOutput, Update
from pretrain.ports import StepReport, StepSettings, StopReason
from pretrain.trainer import Trainer

BATCH = 8


class FakeUpdate:
    grad_norm = torch.tensor(1.0)


class FakeEngine:
    """Skips the updates of the batches it is told to."""

    device = torch.device("cpu")

    def __init__(self, skip: frozenset[int] = frozenset()) -> None:
        self.calls: list[str] = []
        self.skip, self.steps = skip, 0

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        self.calls.append(f"forward {len(batch)}")
        return LossOutput(batch.views[0].mean(), {"mean": batch.views[0].mean()})

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append("backward")

    def step(self, settings: StepSettings) -> FakeUpdate | None:
        self.calls.append("step")
        self.steps += 1
        return None if self.steps - 1 in self.skip else FakeUpdate()


class FakeObjective:
    needs_whole_share = False

    def __init__(self) -> None:
        self.updated: list[int] = []

    def after_step(self, update: Update, progress: Progress, output: LossOutput) -> None:
        self.updated.append(progress.step)


class Recorder:
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.finished: list[tuple[int, StopReason]] = []

    def after_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def finish(self, progress: Progress, reason: StopReason) -> None:
        self.finished.append((progress.step, reason))


class Alone:
    def exchange(self, value: int) -> int:
        return value


def batches() -> Iterator[Batch]:
    number = 0
    while True:
        seeds = torch.arange(BATCH) + number * BATCH
        yield Batch((seeds.float().view(-1, 1, 1, 1),), seeds, seeds)
        number += 1


def fit(
    total: int,
    skip: frozenset[int] = frozenset(),
    stop_after: Duration | None = None,
    request: StopRequest | None = None,
    start: int = 0,
    micro: int = 4,
) -> tuple[Progress, StopReason, FakeEngine, FakeObjective, Recorder]:
    progress = Progress(step=start, samples=start * BATCH, total_steps=total, dataset_size=100)
    engine, objective, recorder = FakeEngine(skip), FakeObjective(), Recorder()
    trainer = Trainer(
        engine=engine,  # type: ignore[arg-type]
        objective=objective,  # type: ignore[arg-type]
        batches=batches(),
        batch_size=BATCH,
        accumulate=SumOfMicroBatches(objective, micro, lambda batch: batch),
        schedule=lambda progress: StepSettings(lr=progress.fraction, weight_decay=0.0),
        stopping=Stopping(request or StopRequest(), Alone(), stop_after, progress, BATCH),
        health=Health(HealthConfig(not_finite=3), BATCH),
        listeners=[recorder],
    )
    end, reason = trainer.fit(progress)
    return end, reason, engine, objective, recorder


def test_it_trains_to_the_end() -> None:
    end, reason, engine, objective, recorder = fit(total=3)
    assert (end.step, end.samples, reason) == (3, 24, "done")
    assert engine.calls == ["forward 4", "backward", "forward 4", "backward", "step"] * 3
    assert objective.updated == [1, 2, 3]
    assert [r.settings.lr for r in recorder.reports] == [0, 1 / 3, 2 / 3]
    assert [r.output.loss.item() for r in recorder.reports] == [3.5, 11.5, 19.5]
    assert recorder.finished == [(3, "done")]


def test_a_skipped_update_consumes_data_and_nothing_else() -> None:
    end, _, engine, objective, recorder = fit(total=3, skip=frozenset({1}))
    assert (end.step, end.samples) == (3, 32)
    assert engine.steps == 4 and objective.updated == [1, 2, 3]
    assert [r.progress.samples for r in recorder.reports] == [8, 24, 32]
    assert [r.settings.lr for r in recorder.reports] == [0, 1 / 3, 2 / 3]


def test_nothing_but_skips_is_trouble() -> None:
    with pytest.raises(TroubleError, match="not_finite after step 1, samples 8 to 32"):
        fit(total=9, skip=frozenset(range(1, 9)))


def test_stop_after_and_signals_leave_early() -> None:
    assert fit(total=9, stop_after=Duration(4, "steps"))[1] == "stop_after"
    request = StopRequest()
    request.ask("interrupted")
    end, reason, *_, recorder = fit(total=9, request=request)
    assert (end.step, reason) == (1, "interrupted") and recorder.finished == [(1, "interrupted")]


def test_a_stop_at_the_very_end_is_done() -> None:
    assert fit(total=4, stop_after=Duration(4, "steps"))[1] == "done"


def test_a_finished_run_does_nothing() -> None:
    end, reason, engine, _, recorder = fit(total=5, start=5)
    assert (end.step, reason, engine.calls) == (5, "done", [])
    assert recorder.finished == [(5, "done")]
