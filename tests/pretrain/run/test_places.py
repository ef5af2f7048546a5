"""Training where nothing can be written, where the disk fills up at any moment, where there are no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from configs.errors import RunError, UserError, fault_of_place
from configs.loading import load
from data_pipeline import demo
from data_pipeline.demo import DemoConfig
from data_pipeline.files import write_atomically
from data_pipeline.quarantine import Broken, Quarantine
from launch.cli.main import main
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.run.folder import Heartbeat, RunFolder
from pretrain.run.main import prepare
from pretrain.tracking.jsonl import Jsonl, rows
from tests.conftest import Ranks
from tests.places import FullDisk, full_disk_environment, unprivileged

SHORT = (
    "train.duration=4 steps", "optimizer.warmup=1 steps", "data.workers=0", "track.wandb=off",
    "checkpoint.every=2 steps", "train.batch_size=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    demo.make(DemoConfig(name="digits"), folder)
    return folder / "train" / "manifest.json"


def keel(root: str, manifest: str, *, at: int | None = None) -> tuple[int, str, list[str]]:
    """`keel train` on a disk that is full from the `at`-th call on, in this process, as a forked rank.

    Gives the exit code, what it said and which calls needed room.
    """
    said = Path(f"{root}.said")
    said.parent.mkdir(parents=True, exist_ok=True)
    where = [f"run.dir={json.dumps(root)}", f"data.manifest={manifest}"]
    sys.argv = ["keel", "train", "smoke/mae", *SHORT, *where]
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with FullDisk(Path(root), at) as disk, pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(ended.value.code or 0), said.read_text(), disk.log


def numbers(calls: Sequence[str]) -> list[int]:
    """Of calls that are alike (the same function, on the same file by turns) the first alone."""
    alike = [re.sub(r"\.\d+-[0-9a-f]+\.part|-\d+-a01|(?<= )\d+$|^\S*/run/", "", call) for call in calls]
    return [number for number, call in enumerate(alike) if call not in alike[:number]]


def test_a_disk_that_fills_up_while_a_run_is_made_is_a_line(tmp_path: Path, manifest: Path) -> None:
    """At every call in turn: nothing counts as a run that isn't one, and the same command makes it later."""

    def config(root: Path) -> RunConfig:
        return load("smoke/mae", RunConfig, [*SHORT, f"run.dir={root}", f"data.manifest={manifest}"])

    with FullDisk(tmp_path) as disk:
        prepare(config(tmp_path / "counted"), world_size=1)
    assert disk.calls > 20
    for at in range(disk.calls):
        root = tmp_path / str(at)
        with FullDisk(root, at), pytest.raises((UserError, OSError)) as failed:
            prepare(config(root), world_size=1)
        line = failed.value if isinstance(failed.value, UserError) else fault_of_place(failed.value)
        assert "No space left on device" in str(line), disk.log[at]
        assert str(root) in str(line), f"{disk.log[at]}: {line}"
        assert not list(root.glob(".*.part")), disk.log[at]
        prepare(config(root), world_size=1)
        assert RunFolder(root).read_state()["status"] == "new"


def test_a_disk_that_fills_up_while_it_trains_is_a_line_and_the_run_goes_on_later(
    tmp_path: Path, manifest: Path, ranks: Ranks
) -> None:
    [(code, said, calls)] = ranks(1, keel, root=str(tmp_path / "run"), manifest=str(manifest))
    assert code == 0, said
    begins = next(number for number, call in enumerate(calls) if call.endswith(".log"))
    refused = 0
    for at in [begins + number for number in numbers(calls[begins:])]:
        root = tmp_path / str(at)
        [(code, said, _)] = ranks(1, keel, root=str(root), manifest=str(manifest), at=at)
        [(resumed, more, _)] = ranks(1, keel, root=str(root), manifest=str(manifest))
        case = f"call {at}, {calls[at]}\n{said}\n--- again:\n{more}"
        assert "Traceback" not in said + more, case
        assert resumed == 0, case
        # What is only shown, or tidied up, may fail without ending the run; then nothing of it is lost.
        assert code in (0, 2), case
        if code == 2:
            assert "No space left on device" in said and "error: " in said, case
        refused += code == 2
        assert [row["step"] for row in rows(root / "metrics.jsonl")] == [1, 2, 3, 4], case
        assert not list(root.glob(".*.part")), case
    assert refused > 10


def test_a_run_whose_disk_is_full_says_so_in_its_state(tmp_path: Path) -> None:
    """In the room that it has kept for that."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.update_state(status="running")
    used: list[Path] = []

    class Full(FullDisk):
        """As long as the spare bytes are there."""

        def need(self, call: str, file: object) -> None:
            if folder.spare.exists() and self.concerns(file):
                used.append(folder.spare)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Full(tmp_path):
        folder.update_state(status="failed", error="the disk is full")
    assert used and not folder.spare.exists()
    assert folder.read_state() == {"status": "failed", "error": "the disk is full"}
    folder.create()
    assert folder.spare.stat().st_size >= 1 << 16, "kept again for the next time"


def test_a_failed_attempt_has_an_end_and_a_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    beat = Heartbeat(folder, {"attempt": folder.claim_attempt(), "from_step": 0})
    beat.progress = Progress(step=7, samples=56, total_steps=9, dataset_size=8)
    beat.end_attempt("failed")
    state = folder.read_state()
    assert (state["step"], state["samples"]) == (7, 56)
    assert state["attempts"][-1]["reason"] == "failed" and state["attempts"][-1]["ended"]
    folder.claim_attempt()
    folder.update_state(step=3)
    beat.end_attempt("failed")
    assert folder.read_state()["step"] == 3, "another attempt has taken over"


@pytest.mark.parametrize("made", [False, True], ids=["a new run", "a run that is there"])
def test_a_run_folder_that_cant_be_written_is_a_line(tmp_path: Path, manifest: Path, made: bool) -> None:
    place = tmp_path / "closed"
    root = place / "run"
    root.mkdir(parents=True)
    if made:
        for room in ("checkpoints", "logs", "pictures", "exports", ".attempts"):
            (root / room).mkdir()
        (root / ".lock").touch()
        (root / ".lock").chmod(0o444)
    root.chmod(0o555)
    place.chmod(0o555)
    command = [
        *unprivileged(), sys.executable, "-m", "launch", "train", "smoke/mae", *SHORT, f"run.dir={root}",
        f"data.manifest={manifest}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    finally:
        root.chmod(0o755)
        place.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: run.dir: {root} can't be ") and "Permission denied" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ranks_whose_disk_fills_up_end_in_one_line(tmp_path: Path, manifest: Path) -> None:
    """Each a process of its own: which of them meets it first is the machine's business."""
    root = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", "smoke/mae", *SHORT, f"data.manifest={manifest}"]
    command += [f"run.dir={root}", "--nproc", "2"]
    # Rank 0's rows of metrics are the first that need room beside what both do when they start.
    full = full_disk_environment(tmp_path / "hook", root / "metrics.jsonl", 1)
    done = subprocess.run(command, env=full, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    assert f"error: {root}/metrics.jsonl: No space left on device; free some space there" in done.stderr
    assert "Traceback" not in done.stderr
    state = RunFolder(root).read_state()
    assert state["status"] == "failed" and "No space left" in state["error"]
    assert state["attempts"][-1]["reason"] == "failed"


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file system without flock, such as Lustre mounted without it."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    yield


def test_without_locks_a_run_goes_on_and_says_so(
    no_locks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    with folder.lease():
        assert (folder.root / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    [said] = caplog.messages
    assert "has no locks (flock)" in said and str(folder.root) in said


def test_without_locks_a_broken_sample_is_written_down(no_locks: None, tmp_path: Path) -> None:
    record = tmp_path / "quarantine.jsonl"
    Quarantine(record, 0.5).add([Broken(0, 1, "shard", "key", "field", "reason", "other")], 10)
    assert len(record.read_text().splitlines()) == 1


def test_other_errors_of_a_lock_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    with pytest.raises(OSError, match="Bad file descriptor"), folder.lease():
        pass


def test_what_is_of_a_place_is_a_line_and_what_may_be_ours_isnt() -> None:
    full = fault_of_place(OSError(errno.ENOSPC, "No space left on device"))
    assert str(full) == "a file that was being written: No space left on device; free some space there"
    named = fault_of_place(OSError(errno.EACCES, "Permission denied", b"/data/gr\xf6\xdfe"))
    assert isinstance(named, UserError) and str(named).startswith(
        "/data/gr\udcf6\udcdfe: Permission denied; look"
    )
    renamed = fault_of_place(OSError(errno.EROFS, "Read-only file system", "a.part", None, "a"))
    assert str(renamed).startswith("a: Read-only file system; ")
    for ours in (
        FileNotFoundError(2, "No such file", "x"),
        OSError(errno.EACCES, "Permission denied"),
        OSError("?"),
    ):
        assert fault_of_place(ours) is None


def test_half_a_row_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for a part of it: the row after the next one would follow on the same line."""
    file = tmp_path / "metrics.jsonl"
    tracker = Jsonl(file, tmp_path)
    tracker.log({"step": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda number, data: real(number, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space left on device") as full:
        tracker.log({"step": 2})
    assert full.value.filename == str(file)
    monkeypatch.setattr(os, "write", real)
    tracker.log({"step": 2})
    assert [row["step"] for row in rows(file)] == [1, 2]


def test_a_second_end_leaves_other_files_alone(tmp_path: Path) -> None:
    tracker = Jsonl(tmp_path / "metrics.jsonl", tmp_path)
    tracker.finish("done")
    with (tmp_path / "another").open("wb", buffering=0) as other:  # takes the number that was freed
        tracker.finish("failed")
        other.write(b"x")


def test_files_of_two_processes_with_one_number_dont_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In containers every rank 0 may be process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    beside: list[str] = []
    real = os.replace

    def replace(source: str | Path, target: str | Path) -> None:
        beside.append(str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        write_atomically(tmp_path / "run.json", "{}")
    assert len(set(beside)) == 2


def test_a_run_whose_folder_is_gone_doesnt_make_it_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "gone" / "run.json", "{}")
    assert not (tmp_path / "gone").exists()


def test_a_run_of_odd_names_is_trained(tmp_path: Path, manifest: Path, ranks: Ranks) -> None:
    odd = tmp_path / "größe 100% = 'a\"b' $(x) \N{CJK UNIFIED IDEOGRAPH-732B}" / (200 * "x")
    [(code, said, _)] = ranks(1, keel, root=str(odd), manifest=str(manifest))
    assert code == 0, said
    assert load(odd / "config.yaml", RunConfig).run.dir == odd
    with pytest.raises(RunError, match="File name too long"):
        RunFolder(tmp_path / (300 * "x")).create()
