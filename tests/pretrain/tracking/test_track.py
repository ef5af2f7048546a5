"""The listener: which steps get a row, what stands in it, and that ranks agree."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from pretrain.clock import Progress
from pretrain.engines import processes
from pretrain.objective import LossOutput
from pretrain.ports import Scores, StepReport, StepSettings
from pretrain.tracking import ROW, Track, TrackConfig, build


class Seen:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float | int]] = []
        self.scores: list[tuple[int, Scores]] = []
        self.status: str | None = None

    def log(self, row: Mapping[str, float | int]) -> None:
        self.rows.append(row)

    def evaluated(self, progress: Progress, scores: Scores) -> None:
        self.scores.append((progress.step, scores))

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None: ...

    def finish(self, status: str) -> None:
        self.status = status


def report(
    step: int, *, loss: float = 1.0, batch: int = 8, wait: float = 0.1, seconds: float = 0.5
) -> StepReport:
    return StepReport(
        progress=Progress(step=step, samples=batch * step, total_steps=25, dataset_size=100),
        output=LossOutput(torch.tensor(loss), {"accuracy": torch.tensor(loss * 10)}),
        update=SimpleNamespace(grad_norm=torch.tensor(3.0)),  # type: ignore[arg-type]
        settings=StepSettings(lr=0.1, weight_decay=0.05),
        data_wait=wait,
        seconds=seconds,
    )


def track(every: int, start: int = 0, **more: Any) -> tuple[Track, Seen]:
    seen = Seen()
    start_at = Progress(step=start, samples=8 * start, total_steps=25, dataset_size=100)
    return Track([seen], every_steps=every, attempt=2, start=start_at, **more), seen


def test_rows_are_due_by_the_step_alone() -> None:
    """The first, every tenth, the last; a resume in between doesn't shift them."""
    whole, seen = track(10)
    for step in range(1, 26):
        whole.after_step(report(step))
    resumed, seen_later = track(10, start=13)
    for step in range(14, 26):
        resumed.after_step(report(step))
    assert [row["step"] for row in seen.rows] == [1, 10, 20, 25]
    assert [row["step"] for row in seen_later.rows] == [20, 25]


def test_a_row_has_the_documented_names_and_the_step_s_own_loss() -> None:
    listener, seen = track(2, clock=lambda: 1234.5)
    listener.after_step(report(1, loss=5.0, wait=0.25, seconds=1.0))
    listener.after_step(report(2, loss=4.0, wait=0.25, seconds=1.0))
    row = seen.rows[-1]
    assert list(row) == [*ROW, "objective/accuracy"]
    assert row == {
        "attempt": 2, "step": 2, "samples": 16, "epoch": 0.16, "loss": 4.0, "lr": 0.1, "weight_decay": 0.05,
        "grad_norm": 3.0, "samples_per_second": 8.0, "data_wait": 0.25, "seconds": 1.0, "time": 1234.5,
        "objective/accuracy": 40.0,
    }  # fmt: skip


def test_times_are_means_since_the_row_before() -> None:
    listener, seen = track(4)
    for step, (wait, seconds) in enumerate([(0.0, 9.0), (0.5, 1.0), (0.0, 0.5), (1.0, 1.5)], start=1):
        listener.after_step(report(step, wait=wait, seconds=seconds))
    assert seen.rows[-1]["data_wait"] == 0.5
    assert seen.rows[-1]["seconds"] == 1.0
    assert seen.rows[-1]["samples_per_second"] == 8.0


def test_samples_of_skipped_steps_count() -> None:
    listener, seen = track(1)
    skipped = report(1)
    listener.after_step(
        StepReport(
            progress=Progress(step=1, samples=24, total_steps=25, dataset_size=100),
            output=skipped.output, update=skipped.update, settings=skipped.settings, data_wait=0, seconds=2.0,
        )
    )  # fmt: skip
    assert seen.rows[0]["samples_per_second"] == 12.0


def test_tensors_are_left_alone_between_rows() -> None:
    """Reading one would make the host wait for the device."""

    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("touched between rows")

    listener, _ = track(10)
    quiet = report(2)
    listener.after_step(
        StepReport(
            quiet.progress, LossOutput(Untouchable(), {}), Untouchable(), quiet.settings, 0.1, 0.5  # type: ignore[arg-type]
        )
    )  # fmt: skip


def row_of_a_rank() -> Mapping[str, float | int]:
    """Runs on forked ranks: rank r's share has loss r + 1, waits r seconds and takes r + 2."""
    rank, seen = processes.start("cpu").rank, Seen()
    listener = Track([seen], every_steps=1, attempt=1, start=Progress(0, 0, 25, 100))
    listener.after_step(report(1, loss=rank + 1.0, wait=float(rank), seconds=2.0 + rank))
    processes.stop()
    return seen.rows[0]


def test_loss_and_times_are_means_over_ranks(ranks: Any) -> None:
    for row in ranks(2, row_of_a_rank):
        assert row["loss"] == 1.5
        assert row["objective/accuracy"] == 15.0
        assert row["data_wait"] == 0.5
        assert row["seconds"] == 2.5


def test_scores_and_the_end_reach_the_trackers() -> None:
    listener, seen = track(1)
    here = report(7).progress
    listener.evaluated(here, Scores("knn", {"top1": 61.0}))
    listener.finish(here, "preempted")
    assert seen.scores == [(7, Scores("knn", {"top1": 61.0}))]
    assert seen.status == "preempted"


def test_build_undoes_before_it_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n{"step": 5}\n')
    start = Progress(step=4, samples=32, total_steps=25, dataset_size=100)
    trackers = build(
        TrackConfig(wandb="off"), tmp_path, run_id="abc", start=start, settings={}, console=io.StringIO()
    )
    for tracker in trackers:
        tracker.log(dict.fromkeys(ROW, 1) | {"step": 5})
        tracker.finish("done")
    assert [line[:10] for line in path.read_text().splitlines()] == ['{"step": 4', '{"attempt"']
    assert (tmp_path / "metrics.undone.jsonl").read_text() == '{"step": 5}\n'


@pytest.mark.parametrize("every", ["10 min", "0 steps", "often"])
def test_a_cadence_that_is_none_is_refused(every: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        TrackConfig.model_validate({"every": every})


def test_a_bare_off_in_yaml_means_off() -> None:
    assert TrackConfig.model_validate({"wandb": False}).wandb == "off"
