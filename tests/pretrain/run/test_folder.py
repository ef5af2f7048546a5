"""The run folder: atomic state, exclusive attempts, one writer."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from configs.errors import RunError
from data_pipeline.files import write_atomically
from pretrain.clock import Progress
from pretrain.run.folder import Heartbeat, RunFolder
from tests.waiting import wait_for


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_attempts_are_claimed_once_each(folder: RunFolder) -> None:
    assert [folder.claim_attempt() for _ in range(3)] == [1, 2, 3]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        numbers = pool.starmap(RunFolder.claim_attempt, [(folder,)] * 20)
    assert sorted(numbers) == list(range(4, 24))


def test_state_is_merged_and_never_seen_half_written(folder: RunFolder) -> None:
    folder.update_state(id="abc", step=1)
    folder.update_state(step=2)
    assert folder.read_state() == {"id": "abc", "step": 2}
    assert [p.name for p in folder.root.iterdir() if p.name.startswith(".run")] == []


def test_a_failed_write_leaves_the_old_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(folder.state_file, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(folder.state_file, "new")
    assert folder.state_file.read_text() == "old"


def test_damaged_state_is_one_line(folder: RunFolder) -> None:
    folder.state_file.write_text('{"id": ')
    with pytest.raises(RunError, match=r"run\.json: can't be read"):
        folder.read_state()


def hold(root: Path, ready: str) -> None:
    with RunFolder(root).lease():
        Path(ready).touch()
        time.sleep(60)


def test_one_writer_at_a_time_and_a_killed_one_lets_go(folder: RunFolder, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(folder.root, str(ready)))
    holder.start()
    wait_for("the holder of the lease", ready.exists)
    with pytest.raises(RunError, match=f"being trained by process {holder.pid}"), folder.lease(patience=0.2):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with folder.lease(patience=0.2):
        pass


def test_the_heartbeat_tells_how_it_ended(folder: RunFolder) -> None:
    progress = Progress(step=5, samples=40, total_steps=9, dataset_size=10)
    beat = Heartbeat(folder, {"attempt": 1, "from_step": 0})
    assert folder.read_state()["status"] == "running"
    beat.finish(progress, "preempted")
    folder.update_state(status="failed", error="no room on the disk")
    Heartbeat(folder, {"attempt": 2, "from_step": 5}).finish(progress, "done")
    state = json.loads(folder.state_file.read_text())
    assert not state["error"], "that of an attempt before"
    assert state["status"] == "done" and state["step"] == 5
    assert [(a["attempt"], a["reason"]) for a in state["attempts"]] == [(1, "preempted"), (2, "done")]


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"run\.dir: .*can't be made: Not a directory"):
        RunFolder(tmp_path / "file" / "run").create()
