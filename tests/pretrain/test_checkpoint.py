"""Publishing and choosing checkpoints: due on time, whole or not at all, damaged ones passed over."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError, RunError
from configs.loading import validate
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointConfig, Checkpointer, latest, published, read_extra
from pretrain.clock import Duration, Progress
from pretrain.collectives import from_main
from pretrain.engines import processes, storage
from pretrain.objective import LossOutput
from pretrain.ports import StepReport
from tests.conftest import Ranks
from tests.forkserver import Died
from tests.pretrain.engines.tiny import BATCH_SIZE, SETTINGS, engine_of, train

START = Progress(step=0, samples=0, total_steps=1000, dataset_size=40)


class FakeEngine:
    """Saves one small tensor; enough to publish."""

    def stage(self, extra: dict[str, Any]) -> FakeStaged:
        return FakeStaged(extra)


class FakeStaged:
    def __init__(self, extra: dict[str, Any]) -> None:
        self.extra = extra

    def write(self, directory: Path, then: Callable[[], None] | None = None) -> None:
        directory.mkdir(parents=True)
        file = storage.write_fragments(directory, 0, [storage.Fragment("model/w", torch.ones(100), 0, 100)])
        storage.write_index(directory, [file], {}, {"extra": self.extra})
        assert then is not None
        then()


def checkpointer(
    run: Path, every: str = "10 steps", keep: int = 3, attempt: int = 1, start: Progress = START
) -> Checkpointer:
    config = CheckpointConfig(every=Duration.parse(every), keep=keep)
    return Checkpointer(
        config,
        run,
        FakeEngine(),
        attempt=attempt,
        start=start,
        batch_size=8,
        extra=lambda p: {"step": p.step},
    )  # type: ignore[arg-type]


def report(step: int) -> StepReport:
    progress = Progress(step, step * 8, 1000, 40)
    return StepReport(progress, LossOutput(torch.zeros(()), {}), None, SETTINGS, 0.0, 0.0)  # type: ignore[arg-type]


def steps(run: Path) -> list[str]:
    return [each.path.name for each in published(run)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [("4 steps", [4, 8, 12]), ("20 samples", [3, 5, 8, 10, 13]), ("1.5 epochs", [8]), ("100 steps", [])],
)
def test_saves_when_due(tmp_path: Path, every: str, expected: list[int]) -> None:
    saver = checkpointer(tmp_path, every, keep=100)
    for step in range(1, 14):
        saver.after_step(report(step))
    saver.wait()
    assert [int(name[5:13]) for name in reversed(steps(tmp_path))] == expected


def test_periods_count_from_the_start_of_the_run_and_not_of_the_attempt(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, "10 steps", attempt=2, start=Progress(7, 56, 1000, 40))
    for step in range(8, 12):
        saver.after_step(report(step))
    saver.wait()
    assert steps(tmp_path) == ["step-00000010-a02"]


def test_saves_at_the_end_once(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, "10 steps")
    saver.after_step(report(10))
    saver.finish(report(10).progress, "done")
    saver.finish(report(13).progress, "interrupted")
    assert steps(tmp_path) == ["step-00000013-a01", "step-00000010-a01"]
    assert read_extra(published(tmp_path)[0].path) == {"step": 13}


def test_an_attempt_that_goes_nowhere_saves_nothing(tmp_path: Path) -> None:
    checkpointer(tmp_path).finish(report(10).progress, "done")
    again = checkpointer(tmp_path, attempt=2, start=report(10).progress)
    again.finish(report(10).progress, "interrupted")
    assert steps(tmp_path) == ["step-00000010-a01"]


def test_minutes_are_rank_0s(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2, saves_by_the_minute, run=tmp_path)
    assert first == second and len(first) == 1


def saves_by_the_minute(run: Path) -> list[str]:
    """Rank 0's clock is moved on by two minutes at step 3; rank 1's at step 1, which must not count."""
    engine, _, here = engine_of(1)
    config = CheckpointConfig(every=Duration(1, "min"))
    saver = Checkpointer(config, run, engine, attempt=1, start=START, batch_size=8, extra=lambda p: {})
    for step in range(1, 8):
        if step == (3 if here.rank == 0 else 1):
            saver.clock.started -= 120
        saver.after_step(report(step))
    saver.wait()
    saver.agreement.settle()
    engine.close()
    processes.stop()
    return steps(run)


def test_keeps_the_newest(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, "1 steps", keep=2)
    for step in range(1, 6):
        saver.after_step(report(step))
    saver.finish(report(5).progress, "done")
    assert steps(tmp_path) == ["step-00000005-a01", "step-00000004-a01"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_newest_is_the_last_attempts(tmp_path: Path) -> None:
    """An attempt that went back behind a damaged checkpoint must go on from its own."""
    checkpointer(tmp_path).finish(report(20).progress, "interrupted")
    checkpointer(tmp_path, attempt=2).finish(report(15).progress, "interrupted")
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000015-a02"


def test_no_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints" / ".unfinished-step-00000003-a01").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert latest(tmp_path) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "index"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    saver = checkpointer(tmp_path)
    saver.save(report(10).progress)
    saver.save(report(20).progress)
    saver.wait()
    newest = published(tmp_path)[0].path
    file = newest / "rank-00000.safetensors"
    content = file.read_bytes()
    match damage:
        case "truncate":
            file.write_bytes(content[:-10])
        case "flip":
            file.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
        case "remove":
            file.unlink()
        case "index":
            (newest / storage.INDEX).unlink()
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000010-a01"
    assert "step-00000020-a01 is damaged and passed over" in caplog.text

    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010-a01")
    with pytest.raises(
        RunError, match=r"all 1 checkpoints are damaged.*remove the folder to start from nothing"
    ):
        latest(tmp_path)


POINTS = ("in a file", "before the index", "before publishing", "after publishing", "in pruning")


def killed_at(point: str, run: Path, victim: int) -> list[float]:
    """Train and save at steps 2 and 4; `victim` is killed at `point` of the second save."""
    engine, objective, here = engine_of(1)
    config = CheckpointConfig(every=Duration(2, "steps"), keep=1 if point == "in pruning" else 3)
    saver = Checkpointer(
        config, run, engine, attempt=1, start=START, batch_size=BATCH_SIZE, extra=lambda p: {"step": p.step}
    )
    losses = train(engine, objective, 0, 2)
    saver.after_step(report(2))
    saver.wait()
    losses += train(engine, objective, 2, 4)

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if here.rank == victim:
        match point:
            case "in a file":
                storage._flushed = die
            case "before the index":
                storage.write_index = die
            case "before publishing":
                saver._publish = die  # type: ignore[method-assign]
            case "after publishing":
                storage.flush_folder, flush = (
                    lambda folder: die() if folder == saver.folder else flush(folder),
                    storage.flush_folder,
                )
            case "in pruning":
                checkpoint.shutil.rmtree = die  # type: ignore[attr-defined]
    saver.after_step(report(4))
    saver.settle()
    return losses


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_instant_leaves_a_valid_checkpoint(ranks: Ranks, tmp_path: Path, point: str) -> None:
    answers = ranks(2, killed_at, point=point, run=tmp_path, victim=0, may_die=True)
    assert answers[0] == Died(signal.SIGKILL)
    found = latest(tmp_path)
    assert found is not None
    assert found.name == f"step-0000000{4 if point in ('after publishing', 'in pruning') else 2}-a01"
    straight = ranks(1, straight_on, run=tmp_path / "other", start=0)[0]
    assert ranks(2, straight_on, run=tmp_path, start=int(found.name[5:13]))[0] == pytest.approx(
        straight[int(found.name[5:13]) :], rel=1e-5
    )
    assert not list((tmp_path / "checkpoints").glob(".*"))  # swept by the next attempt


def test_a_kill_of_another_rank_leaves_a_valid_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(2, killed_at, point="in a file", run=tmp_path, victim=1, may_die=True)
    assert answers[1] == Died(signal.SIGKILL)
    found = latest(tmp_path)
    assert found is not None and found.name == "step-00000002-a01"


def straight_on(run: Path, start: int) -> list[float]:
    """Losses from `start` to step 6, resuming where there is something to resume from."""
    engine, objective, _ = engine_of(1)
    if (found := latest(run)) is not None:
        assert engine.load(found) == {"step": start}
    Checkpointer(
        CheckpointConfig(), run, engine, attempt=2, start=START, batch_size=BATCH_SIZE, extra=lambda p: {}
    ).agreement.settle()
    losses = train(engine, objective, start, 6)
    engine.close()
    processes.stop()
    return losses


def save_where_there_is_no_room(run: Path) -> tuple[int, str]:
    engine, _, here = engine_of(1)
    saver = Checkpointer(
        CheckpointConfig(),
        run,
        engine,
        attempt=1,
        start=START,
        batch_size=8,
        extra=lambda p: {"step": p.step},
    )
    saver.save(report(1).progress)
    saver.wait()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if here.rank == 1:
        storage.save_file = full
    saver.save(report(2).progress)
    step = 2
    try:
        while (step := step + 1) < 1000:  # training goes on until every rank knows
            saver.after_step(report(step))
            time.sleep(0.01)
    except RunError as error:
        return step, str(error)
    return step, "trained on"


def test_a_full_disk_is_told_on_every_rank_and_leaves_nothing(ranks: Ranks, tmp_path: Path) -> None:
    (step, said), other = ranks(2, save_where_there_is_no_room, run=tmp_path)
    assert other == (step, said)
    assert "can't be written: rank 1: [Errno 28] No space left on device" in said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001-a01"]


def save_where_the_mount_is_lost(run: Path) -> str:
    engine, _, _ = engine_of(1)
    saver = Checkpointer(
        CheckpointConfig(), run, engine, attempt=1, start=START, batch_size=8, extra=lambda p: {}
    )
    saver.save(report(1).progress)
    saver.wait()
    from_main(lambda: run.rename(run.with_name("elsewhere")))
    saver.save(report(2).progress)
    try:
        saver.wait()
    except RunError as error:
        return str(error)
    return "saved"


def test_a_lost_mount_is_told_on_every_rank_and_not_written_beneath(ranks: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    said, other = ranks(2, save_where_the_mount_is_lost, run=run)
    assert other == said and "can't be written: rank 0: [Errno 2] No such file" in said
    assert not run.exists()
    run.with_name("elsewhere").rename(run)  # it is back
    assert latest(run) == run / "checkpoints" / "step-00000001-a01"


def test_config_says_what_it_takes() -> None:
    assert CheckpointConfig() == CheckpointConfig(every=Duration(10, "min"), keep=3)
    with pytest.raises(ConfigError, match="every"):
        validate({"every": "0 steps"}, CheckpointConfig, "x.yaml")
    with pytest.raises(ConfigError, match="keep"):
        validate({"keep": 0}, CheckpointConfig, "x.yaml")


def test_a_save_takes_its_time_off_the_clock(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, "1 min")
    saver.clock.started -= 61
    before = time.monotonic()
    saver.save(report(3).progress)
    assert saver.clock.started >= before


class SlowStaged(FakeStaged):
    def write(self, directory: Path, then: Callable[[], None] | None = None) -> None:
        time.sleep(0.3)
        super().write(directory, then)


def test_training_goes_on_while_one_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "stage", lambda self, extra: SlowStaged(extra))
    told: list[tuple[int, set[str]]] = []
    saver = checkpointer(tmp_path, "1 steps")
    saver.tell = lambda progress, seconds: told.append((progress.step, set(seconds)))
    started = time.monotonic()
    saver.after_step(report(1))
    assert time.monotonic() - started < 0.2 and not steps(tmp_path)
    saver.after_step(report(2))  # waits for the one before
    assert time.monotonic() - started > 0.3 and steps(tmp_path) == ["step-00000001-a01"]
    saver.finish(report(2).progress, "done")
    assert steps(tmp_path) == ["step-00000002-a01", "step-00000001-a01"]
    assert told == [(1, {"checkpoint_stall"}), (2, {"checkpoint_stall", "checkpoint_write"})]


def test_a_save_does_not_wait_until_older_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing some gigabytes takes as long as a copy of them; the run's end waits for it."""
    goes_on, remove = threading.Event(), shutil.rmtree

    def slow(folder: Path, **how: Any) -> None:
        assert goes_on.wait(20)
        remove(folder, **how)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", slow)
    saver = checkpointer(tmp_path, "1 steps", keep=1)
    saver.save(report(1).progress)
    saver.save(report(2).progress)
    saver.wait()
    assert steps(tmp_path) == ["step-00000002-a01"], "published names tell what is whole"
    saver.save(report(3).progress)  # would wait for ever, were it to wait
    assert not goes_on.is_set()
    assert (tmp_path / "checkpoints" / ".unfinished-step-00000001-a01").exists()
    goes_on.set()
    saver.finish(report(3).progress, "done")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003-a01"]


def test_a_stale_incarnation_publishes_nothing(tmp_path: Path) -> None:
    (tmp_path / ".attempts").mkdir()
    (tmp_path / ".attempts" / "a01").touch()
    stale = checkpointer(tmp_path, attempt=1)
    stale.save(report(10).progress)
    stale.wait()
    (tmp_path / ".attempts" / "a02").touch()
    with pytest.raises(RunError, match="attempt 2 has taken over; attempt 1 publishes nothing"):
        stale.finish(report(20).progress, "done")
    assert steps(tmp_path) == ["step-00000010-a01"]


def test_a_stale_incarnation_past_the_check_finds_its_folder_gone(tmp_path: Path) -> None:
    stale = checkpointer(tmp_path, attempt=1)

    def publish_late(unfinished: Path, path: Path, then: object) -> None:
        checkpoint.sweep(tmp_path, attempt=2)  # what attempt 2 does after its claim, before it chooses
        unfinished.rename(path)

    stale._publish = publish_late  # type: ignore[method-assign]
    with pytest.raises(FileNotFoundError):
        stale.finish(report(10).progress, "done")
    assert steps(tmp_path) == [] and latest(tmp_path) is None


def test_sweeping_leaves_newer_attempts_alone(tmp_path: Path) -> None:
    for name in ("step-00000001-a01", "step-00000001-a02", "step-00000001-a03"):
        (tmp_path / "checkpoints" / f".unfinished-{name}").mkdir(parents=True)
    checkpoint.sweep(tmp_path, attempt=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [".unfinished-step-00000001-a03"]


def test_pruning_keeps_newest_periods_and_pins(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, "1 steps", keep=100)
    for step in range(1, 13):
        saver.after_step(report(step))
    saver.wait()
    checkpoint.pin(tmp_path, "best top1", "step-00000003-a01", value=51.0)
    checkpoint.pin(tmp_path, "best top1", "step-00000007-a01", value=52.5)
    removed = checkpoint.prune(tmp_path, keep=2, keep_every_steps=5)
    assert [int(name[5:13]) for name in steps(tmp_path)] == [12, 11, 10, 7, 5]
    assert len(removed) == 7
    assert checkpoint.pins(tmp_path) == {"best top1": {"checkpoint": "step-00000007-a01", "value": 52.5}}
    checkpoint.pin(tmp_path, "best top1", None)
    assert checkpoint.prune(tmp_path, keep=2, keep_every_steps=5) == ["step-00000007-a01"]
    with pytest.raises(RunError, match="step-00000099-a01: no such checkpoint"):
        checkpoint.pin(tmp_path, "mine", "step-00000099-a01")


def test_pruning_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, "1 steps", keep=100)
    for step in range(1, 4):
        saver.after_step(report(step))
    saver.wait()
    (tmp_path / "checkpoints" / "step-00000003-a01" / storage.INDEX).unlink()
    checkpoint.prune(tmp_path, keep=1)
    assert steps(tmp_path) == ["step-00000002-a01"]


def test_keep_every_is_counted_in_steps(tmp_path: Path) -> None:
    config = CheckpointConfig(every=Duration(1, "steps"), keep=1, keep_every=Duration(1, "epochs"))  # 5 steps
    saver = Checkpointer(
        config, tmp_path, FakeEngine(), attempt=1, start=START, batch_size=8, extra=lambda p: {}
    )  # type: ignore[arg-type]
    for step in range(1, 13):
        saver.after_step(report(step))
    saver.wait()
    assert [int(name[5:13]) for name in steps(tmp_path)] == [12, 10, 5]
    with pytest.raises(ConfigError, match=r"keep_every.*not in minutes"):
        validate({"keep_every": "5 min"}, CheckpointConfig, "x.yaml")
