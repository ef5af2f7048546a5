"""The table of runs: every state from files, queue and processes; torn files; what is done with runs."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.registry import make_run, state
from configs.errors import RunError
from launch.runs import queue, registry
from launch.runs.files import tail
from launch.runs.queue import GONE, JobState
from launch.runs.registry import best, judge, list_runs
from launch.runs.table import duration, summary, table
from launch.slurm import manage
from launch.slurm.submission import Submission

Said = tuple[int, str, str]
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> dict[str, JobState]:
    """SLURM's answers; counts how often it was asked in `asked`."""
    known: dict[str, JobState] = {}

    def states(ids: Any, timeout: float = 5.0) -> Mapping[str, JobState]:
        wanted = list(ids)
        return {job: known[job] for job in wanted if job in known}

    monkeypatch.setattr(queue, "states", states)
    return known


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def attempts(reason: str | None = None) -> list[dict[str, Any]]:
    ended = {} if reason is None else {"ended": ago(0), "reason": reason}
    return [{"attempt": 1, "from_step": 0, "world_size": 2, "started": ago(900)} | ended]


def submission(job: str = "7_1", *, executor: str = "slurm", **changes: Any) -> dict[str, Any]:
    cluster = {"executor": executor}
    return {
        "job_id": job, "cluster": cluster, "submitted": ago(999), "log_folder": "", "code": "", "history": [],
        "cancelled": None,
    } | changes  # fmt: skip


# ---- state -----------------------------------------------------------------------------------

RUNNING = {"status": "running", "attempts": attempts()}
PREEMPTED = {"status": "stopped", "attempts": attempts("preempted")}
FAILED = {"status": "failed", "attempts": attempts(), "error": "loss was not finite"}
ECHO = FAILED | {"error": "RuntimeError('[pair.cc:553] Connection closed by peer [127.0.0.1]:20368')"}


@pytest.mark.parametrize(
    ("run", "known", "expected"),
    [
        # the files alone
        ({}, {}, ("new", "")),
        ({"status": "done"}, {}, ("done", "")),
        (FAILED, {}, ("failed", "loss was not finite")),
        (PREEMPTED, {}, ("stopped", "preempted")),
        (RUNNING, {"age": 9.0}, ("running", "")),
        (RUNNING, {"age": 301.0}, ("stale", "")),
        (RUNNING, {"age": 9.0, "held": True}, ("running", "")),
        (RUNNING, {"age": 9.0, "held": False}, ("lost", "")),
        (RUNNING, {"age": 301.0, "held": True}, ("running", "no heartbeat for 301 s")),
        (PREEMPTED, {"held": True}, ("running", "")),
        # with a job
        ({}, {"job": JobState("PENDING", "Resources")}, ("pending", "Resources")),
        ({}, {"job": JobState("PENDING", "BeginTime", restarts=1)}, ("requeued", "BeginTime")),
        (PREEMPTED, {"job": JobState("PENDING", "Priority")}, ("requeued", "Priority")),
        (FAILED, {"job": JobState("PENDING", "Priority")}, ("requeued", "Priority")),
        (RUNNING, {"job": JobState("RUNNING"), "age": 9.0}, ("running", "")),
        (RUNNING, {"job": JobState("RUNNING"), "age": 720.0}, ("running", "no heartbeat for 720 s")),
        ({}, {"job": JobState("CONFIGURING")}, ("running", "")),
        (FAILED, {"job": JobState("RUNNING")}, ("running", "")),
        ({"status": "done"}, {"job": JobState("COMPLETING")}, ("done", "")),
        (RUNNING, {"job": JobState("NODE_FAIL"), "age": 9.0}, ("lost", "SLURM: NODE_FAIL")),
        (RUNNING, {"job": JobState("TIMEOUT"), "age": 9.0}, ("lost", "SLURM: TIMEOUT")),
        (RUNNING, {"job": JobState(GONE), "age": 9.0}, ("lost", "")),
        (RUNNING, {"job": JobState("OUT_OF_MEMORY")}, ("failed", "SLURM: out of memory")),
        ({}, {"job": JobState("FAILED", "NonZeroExitCode", "", 0, 1)}, ("failed", "")),
        (PREEMPTED, {"job": JobState("COMPLETED")}, ("stopped", "preempted")),
        (FAILED, {"job": JobState("FAILED")}, ("failed", "loss was not finite")),
        (RUNNING, {"job": JobState("CANCELLED", "by 0")}, ("cancelled", "")),
        # a rank that lost a peer has said so
        (ECHO, {"job": JobState("RUNNING"), "age": 9.0}, ("running", "")),
        (ECHO, {"job": JobState("PENDING", "BeginTime")}, ("requeued", "BeginTime")),
        (ECHO, {"job": JobState("NODE_FAIL")}, ("lost", "SLURM: NODE_FAIL")),
        (ECHO, {"job": JobState("FAILED")}, ("failed", "")),
        (ECHO, {"job": JobState("CANCELLED")}, ("cancelled", "")),
        (ECHO, {"submitted": True, "age": 9.0}, ("running", "")),
        (ECHO, {"submitted": True, "age": 400.0}, ("stale", "")),
        (ECHO, {"age": 9.0, "held": False}, ("failed", "")),
        # marked by keel cancel
        (PREEMPTED, {"cancelled": True}, ("cancelled", "")),
        (RUNNING, {"cancelled": True, "job": JobState("COMPLETING")}, ("running", "")),
        (RUNNING, {"cancelled": True, "job": JobState(GONE)}, ("cancelled", "")),
        ({"status": "done"}, {"cancelled": True}, ("done", "")),
        # SLURM doesn't answer
        ({}, {"submitted": True}, ("new", "submitted, but SLURM doesn't answer")),
        (RUNNING, {"submitted": True, "age": 9.0}, ("running", "")),
        (RUNNING, {"submitted": True, "age": 400.0, "held": False}, ("stale", "")),
    ],
)
def test_the_state_follows_from_run_queue_and_process(
    run: Mapping[str, Any], known: Mapping[str, Any], expected: tuple[str, str]
) -> None:
    assert judge(run, **known) == expected


# ---- reading ---------------------------------------------------------------------------------


def test_a_row_holds_what_the_files_say(tmp_path: Path, jobs: dict[str, JobState]) -> None:
    make_run(
        tmp_path / "a" / "one",
        run=state(status="running", heartbeat=ago(20), step=4, total_steps=10, attempts=attempts() * 3),
        job=submission(),
        objective="moco",
        rows=6,
        evaluations={2: {"top1": 40.0}, 4: {"top1": 61.0}, 6: {"top1": 55.0}},
    )
    jobs["7_1"] = JobState("RUNNING", "", "node[1-2]", 2)
    (run,) = list_runs(tmp_path, now=NOW.timestamp())
    assert (run.name, run.objective, run.state, run.job) == ("a/one", "moco", "running", "7_1")
    assert (run.step, run.total, run.restarts, run.host) == (6, 10, 2, "node[1-2]")
    assert run.loss == pytest.approx(1 / 6)
    assert run.best == registry.Score("knn/top1", 61.0, 4)
    assert run.heartbeat_age == pytest.approx(20)
    assert run.eta == pytest.approx(4 * 0.05)
    assert run.samples_per_second == 640


def test_two_hundred_runs_are_found_in_their_order(tmp_path: Path, jobs: dict[str, JobState]) -> None:
    expected = {}
    for number in range(200):
        kind = ("done", "failed", "stopped")[number % 3]
        path = tmp_path / f"sweep-{number % 4}" / f"run-{number:03d}"
        ended = attempts("preempted") if kind == "stopped" else attempts()
        changes = {"status": kind, "attempts": ended, "step": number}
        make_run(path, run=state(**changes), rows=number % 5, evaluations={1: {"top1": float(number)}})
        expected[str(path.relative_to(tmp_path))] = kind
    (tmp_path / "sweep-1" / "submissions" / "code").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    found = list_runs(tmp_path)
    assert {run.name: run.state for run in found} == expected
    assert [run.name for run in found] == sorted(expected)
    assert [int(run.best.value) for run in found if run.best] == [int(run.name[-3:]) for run in found]
    assert summary(found) == "200 runs: 67 done, 67 failed, 66 stopped"


def test_slurm_is_asked_once_and_only_about_its_own_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(queue, "states", lambda ids: asked.append(sorted(ids)) or {})
    for number in range(4):
        make_run(tmp_path / f"r{number}", run=state(status="running"), job=submission(f"9_{number}"))
    make_run(tmp_path / "local", run=state(status="running"), job=submission("4321", executor="local"))
    make_run(tmp_path / "done", run=state(), job=submission("5"))
    list_runs(tmp_path)
    assert asked == [["9_0", "9_1", "9_2", "9_3"]]


def test_torn_missing_and_foreign_files_count_for_nothing(tmp_path: Path, jobs: dict[str, JobState]) -> None:
    run = tmp_path / "torn"
    make_run(run, run=state(), rows=3, evaluations={1: {"top1": 1.0}})
    (run / "run.json").write_text('{"status": "do')
    (run / "slurm.json").write_text("[]")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (run / "evaluations.jsonl").write_text(
        '{"step": 1, "name": "knn", "val\n{"step": 2, "name": "knn", "values": {"top1": 3}}\n'
    )
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text("x: 1")
    make_run(tmp_path / "empty", run={})
    for name in ("run.json", "metrics.jsonl", "evaluations.jsonl"):
        (tmp_path / "empty" / name).unlink()
    empty, torn = list_runs(tmp_path)
    assert (torn.step, torn.loss, torn.state) == (3, pytest.approx(1 / 3), "unreadable")
    assert torn.note == torn.broken == "run.json: is torn, or no JSON"
    assert torn.best == registry.Score("knn/top1", 3.0, 2)
    assert (empty.name, empty.state, empty.step, empty.best) == ("empty", "new", 0, None)


def test_only_the_end_of_a_large_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n, "pad": "x" * 90}) + "\n" for n in range(1000)))
    assert [row["step"] for row in tail(file, last=2)] == [998, 999]
    assert 100 < len(tail(file)) < 200
    assert tail(file, size=50) == []
    assert tail(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("metric", "best_value"),
    [(None, 3.0), ("knn/top1", 3.0), ("knn/loss", 0.5), ("linear/top1", 9.0), ("x/y", None)],
)
def test_the_best_is_the_highest_or_of_a_loss_the_lowest(
    metric: str | None, best_value: float | None
) -> None:
    rows = [
        {"step": 1, "name": "knn", "values": {"top1": 3.0, "loss": 0.7}},
        {"step": 2, "name": "knn", "values": {"top1": 2.0, "loss": 0.5}},
        {"step": 2, "name": "linear", "values": {"top1": 9.0}},
    ]
    found = best(rows, metric)
    assert (found and found.value) == best_value


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "lower", "expected"),
    [
        ([50.0, NAN, 40.0], None, 50.0),
        ([NAN, 50.0, INF], None, 50.0),
        ([-INF, 3.0, NAN], True, 3.0),
        ([50.0, 40.0], True, 40.0),
        ([NAN, INF], None, INF),  # nothing to choose from: the newest is shown
    ],
)
def test_what_isnt_finite_is_never_the_best(values: list[float], lower: bool | None, expected: float) -> None:
    rows = [{"step": n, "name": "knn", "values": {"top1": value}} for n, value in enumerate(values)]
    found = best(rows, lower=lower)
    assert found is not None and found.value == expected
    bad = [{"step": 1, "name": "knn", "values": {"top1": value}} for value in (True, "9", None, [1], 10**400)]
    assert registry.scores(bad, "knn/top1") == []


SHAPES: dict[str, Any] = {
    "metrics.jsonl": [
        '{"step": null}', '{"step": "abc"}', '{"step": -1}', '{"step": 1e400}', '{"loss": 1}', "[1]", "7",
        '{"step": 9, "loss": "low"}', '{"step": 9, "loss": [1]}', '{"step": 9, "seconds": {}}',
        '{"step": 9, "seconds": null}', '{"step": 9, "samples_per_second": "x"}', '{"step": 9, "loss": true}',
    ],
    "evaluations.jsonl": [
        '{"step": null, "name": "knn", "values": {}}', '{"step": 9, "name": "knn", "values": [1]}',
        '{"step": 9, "name": 3, "values": {}}', '{"step": 9}', "null", '"x"',
    ],
    "run.json": [
        "{", "", "[]", "7", "\0\0", '{"status": 3}', '{"status": "dnoe"}', '{"status": null}',
        '{"attempts": {}}', '{"attempts": [1]}', '{"attempts": "x"}', '{"step": "x"}', '{"heartbeat": 3}',
        '{"total_steps": "many"}', '{"error": {}}', '{"host": []}',
    ],
    "slurm.json": [
        "{", "[]", '{"job_id": 7, "cluster": {}}', '{"job_id": "7", "cluster": null}',
        '{"job_id": "7", "cluster": {"executor": 3}}', '{"job_id": "../7", "cluster": {}}',
        '{"job_id": "7", "cluster": {}, "log_folder": 3}', '{"job_id": "7", "cluster": {}, "history": {}}',
        '{"job_id": "7", "cluster": {}, "cancelled": []}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("file", SHAPES)
def test_runs_of_another_shape_are_named_and_the_table_stays(
    tmp_path: Path,
    jobs: dict[str, JobState],
    monkeypatch: pytest.MonkeyPatch,
    keel: Callable[..., Said],
    file: str,
) -> None:
    """Each kind of breakage in a run of its own, between two that are well."""
    Told(monkeypatch)
    for name in ("a", *(f"b{number:02d}" for number in range(len(SHAPES[file]))), "c"):
        make_run(
            tmp_path / name,
            run=state(status="failed", attempts=attempts("preempted")),
            job=submission(),
            rows=3,
            evaluations={3: {"top1": 5.0}},
        )
    for number, content in enumerate(SHAPES[file]):
        path = tmp_path / f"b{number:02d}" / file
        if file.endswith("l"):
            with path.open("a") as rows:
                rows.write(content + "\n")
        elif file == "run.json" and content.startswith('{"'):
            path.write_text(json.dumps({**state(status="failed"), **json.loads(content)}))
        else:
            path.write_text(content)
    code, out, err = keel("runs", tmp_path, "--json")
    found = json.loads(out)
    assert (code, err, found[0]["broken"], found[-1]["broken"]) == (0, "", "", "")
    for run, content in zip(found[1:-1], SHAPES[file], strict=True):
        assert f"{file}: " in run["broken"] and run["broken"] in run["note"], (content, run)
    assert keel("runs", tmp_path)[0] == 0
    for metric in ("knn/top1", "loss"):
        code, out, _ = keel("best", tmp_path, "--metric", metric, "--json")
        assert code == 0 and {Path(one["run"]).name for one in json.loads(out)} >= {"a", "c"}
    for run in found:
        for done in (manage.cancel, manage.resumable):
            with suppress(RunError):  # and nothing else
                done([Path(run["path"])])


def test_a_run_whose_state_is_gone_isnt_taken_for_a_new_one(
    tmp_path: Path, jobs: dict[str, JobState], keel: Callable[..., Said]
) -> None:
    for name in ("gone", "torn"):
        make_run(tmp_path / name, run=state(), rows=3)
    (tmp_path / "gone" / "run.json").unlink()
    (tmp_path / "torn" / "run.json").write_text('{"status": "do')
    found = list_runs(tmp_path)
    assert [(run.state, run.resumable) for run in found] == [("unreadable", False)] * 2
    assert found[0].note == "run.json: is gone, and the run has trained"
    for name in ("gone", "torn"):
        code, _, err = keel("resume", tmp_path / name)
        assert code == 2 and "run.json: is " in err and "restore it from a copy" in err


@contextmanager
def leased(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the run's lease, and says by its exit code that it was asked to save."""
    code = (
        "import fcntl, os, platform, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(3))\n"
        f"file = open({str(run / '.lock')!r}, 'a+'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write(f'process {os.getpid()} on {platform.node()}\\n'); file.flush()\n"
        "print('held', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_process_that_is_gone_is_noticed_at_once(tmp_path: Path, jobs: dict[str, JobState]) -> None:
    run = tmp_path / "run"
    make_run(run, run=state(status="running", attempts=attempts()))
    with leased(run):
        assert list_runs(tmp_path)[0].state == "running"
    assert list_runs(tmp_path)[0].state == "lost"
    with (run / ".lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the look has left the lease free
        file.truncate()
        file.write(f"process 1 on another-{platform.node()}\n")
    assert list_runs(tmp_path)[0].state == "running"


def test_the_last_error_is_that_of_the_rank_that_failed(tmp_path: Path, jobs: dict[str, JobState]) -> None:
    run = tmp_path / "run"
    make_run(run, run=state(status="running", attempts=attempts()), job=submission())
    jobs["7_1"] = JobState(GONE)
    (run / "logs" / "rank-00000.log").write_text(
        "--- 2026 rank 0\nRuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1\nrank 0: leaves\n"
    )
    (run / "logs" / "rank-00001.log").write_text(
        "step 3\nTraceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: no memory left\n"
    )
    assert list_runs(tmp_path)[0].note == "torch.OutOfMemoryError: no memory left"
    for log in (run / "logs").iterdir():
        log.unlink()
    output = tmp_path / "submitit" / "7_1_0_log.err"
    output.parent.mkdir()
    output.write_text("srun: error: node1: task 0: Killed\n")
    (run / "slurm.json").write_text(json.dumps(submission(log_folder=str(output.parent))))
    assert list_runs(tmp_path)[0].note == "srun: error: node1: task 0: Killed"


def test_a_job_that_left_no_word_says_where_to_look(tmp_path: Path, jobs: dict[str, JobState]) -> None:
    """As where the run folder isn't there on the nodes."""
    make_run(tmp_path / "run", run=state(status="new"), job=submission())
    jobs["7_1"] = JobState("FAILED", "JobLaunchFailure", "node1", 0, 1)
    (run,) = list_runs(tmp_path)
    silent = f", and nothing was printed; see that its nodes can write to {tmp_path / 'run'}"
    assert (run.state, run.note) == ("failed", f"SLURM: FAILED, JobLaunchFailure{silent}")
    jobs["7_1"] = JobState(GONE)
    (run,) = list_runs(tmp_path)
    assert (run.state, run.note) == ("lost", f"SLURM knows no job 7_1{silent}")


@pytest.mark.parametrize(
    "accounting", ["exec sleep 300", "echo 'accounting storage is disabled' >&2; exit 1"]
)
def test_the_table_comes_whether_slurm_answers_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accounting: str
) -> None:
    """A controller that hangs, and accounting that hangs too or isn't there."""
    for name, body in (("squeue", "exec sleep 300"), ("sacct", accounting)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(queue, "states", partial(queue.states, timeout=0.3))
    for name, run in (("echo", ECHO), ("failed", FAILED), ("running", RUNNING)):
        make_run(tmp_path / "runs" / name, run=state(**run, heartbeat=ago(9)), job=submission())
    began = time.monotonic()
    found = list_runs(tmp_path / "runs", now=NOW.timestamp())
    assert [run.state for run in found] == ["running", "failed", "running"]
    assert time.monotonic() - began < 60


# ---- commands --------------------------------------------------------------------------------


def test_runs_needs_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "one", run=state())
    code = (
        "import sys; from launch.cli.main import app\n"
        f"try: app(['runs', {str(tmp_path)!r}])\n"
        "except SystemExit: pass\n"
        "print(sorted(set(sys.modules) & {'torch', 'numpy', 'timm', 'deepspeed', 'rich.table'}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-2:] == ["1 runs: 1 done", "[]"]


def test_the_table_sorts_by_any_column(tmp_path: Path, keel: Callable[..., Said]) -> None:
    for name, value in (("a", 5.0), ("b", 9.0), ("c", 7.0)):
        make_run(tmp_path / name, run=state(), evaluations={1: {"top1": value}})
    make_run(tmp_path / "d", run=state())
    code, out, _ = keel("runs", tmp_path, "--sort=-best")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["run", "b", "c", "a", "d", "4"]
    assert [run["name"] for run in json.loads(keel("runs", tmp_path, "--json", "--sort", "best")[1])] == [
        *"acbd"
    ]
    code, _, err = keel("runs", tmp_path, "--sort", "size")
    assert (code, "error: --sort: found size; there are path, name," in err) == (2, True)
    code, _, err = keel("runs", tmp_path / "no")
    assert (code, err) == (2, f"error: {tmp_path / 'no'}: no such folder; name one that holds runs\n")


def test_columns_that_are_empty_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "run", run=state(host=""), rows=0)
    text = table(list_runs(tmp_path))
    assert text.splitlines()[0].split() == ["run", "objective", "state", "step"]
    assert all(len(line) <= 12 for line in table(list_runs(tmp_path), width=12).splitlines())
    assert [duration(s) for s in (None, 8, 725, 11_220, 187_300)] == [
        "",
        "8 s",
        "12 min",
        "3 h 07",
        "2 d 04 h",
    ]


def test_logs_show_the_end_and_follow(tmp_path: Path, keel: Callable[..., Said]) -> None:
    run = tmp_path / "run"
    make_run(run, run=state())
    code, _, err = keel("logs", run)
    assert (code, err) == (2, f"error: {run}: nothing was printed yet, so it hasn't started; see keel runs\n")
    log = run / "logs" / "rank-00000.log"
    log.write_text("".join(f"line {n}\n" for n in range(200)) + "torn")
    assert keel("logs", run, "-n", "2")[1] == "line 198\nline 199\ntorn\n"
    assert len(keel("logs", run)[1].splitlines()) == 101
    code, _, err = keel("logs", run, "--rank", 3)
    assert (code, err) == (2, f"error: --rank: found 3; {run} has logs of 0\n")
    followed = manage.lines(log, 1, follow=True)
    assert next(followed) == "line 199"
    with log.open("a") as file:
        file.write(" no more\nand on\nnot who")
    assert [next(followed), next(followed)] == ["torn no more", "and on"]
    later = threading.Timer(0.3, append, (log, "le\n"))
    later.start()
    assert next(followed) == "not whole"
    later.join()
    followed.close()


def append(file: Path, text: str) -> None:
    with file.open("a") as opened:
        opened.write(text)


def test_before_a_rank_speaks_logs_are_its_jobs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, run=state(status="new"), job=submission("12", log_folder=str(tmp_path / "submitit")))
    (tmp_path / "submitit").mkdir()
    (tmp_path / "submitit" / "12_0_log.err").write_text("slurmstepd: error: no such container\n")
    (tmp_path / "submitit" / "12_0_log.out").write_text("")
    assert manage.log_of(run).name == "12_0_log.err"


class Told:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, look: Callable[[], object] = lambda: None) -> None:
        self.calls: list[tuple[list[str], bool]] = []

        def cancel(ids: list[str], *, to_save: bool = False, timeout: float = 30.0) -> None:
            look()
            self.calls.append((list(ids), to_save))

        monkeypatch.setattr(queue, "cancel", cancel)


def test_cancel_marks_first_and_lets_a_running_job_save(
    tmp_path: Path, jobs: dict[str, JobState], monkeypatch: pytest.MonkeyPatch, keel: Callable[..., Said]
) -> None:
    jobs |= {"1": JobState("RUNNING"), "2": JobState("PENDING"), "3": JobState("COMPLETED")}
    for number in (1, 2, 3):
        status = {3: "done"}.get(number, "running")
        run = state(status=status, attempts=attempts())
        make_run(tmp_path / f"r{number}", run=run, job=submission(str(number)))
    marks: list[bool] = []

    def look() -> None:
        record = Submission.of(tmp_path / f"r{len(marks) + 1}")
        marks.append(bool(record and record.cancelled))

    told = Told(monkeypatch, look)
    code, out, _ = keel("cancel", *(tmp_path / f"r{n}" for n in (1, 2, 3)))
    assert code == 0
    assert told.calls == [(["1"], True), (["2"], False)]
    assert marks == [True, True]
    assert "job 1 saves and ends" in out and "job 2 is cancelled" in out and "isn't running: done" in out
    assert (record := Submission.of(tmp_path / "r3")) and record.cancelled is None
    jobs["1"] = JobState("COMPLETED")
    assert list_runs(tmp_path)[0].state == "cancelled"


def test_cancel_asks_a_local_run_to_save(tmp_path: Path, jobs: dict[str, JobState]) -> None:
    run = tmp_path / "run"
    make_run(run, run=state(status="running", attempts=attempts()))
    with leased(run) as process:
        ((_, what),) = manage.cancel([run])
        assert what == f"process {process.pid} saves and ends"
        assert process.wait(60) == 3
    make_run(tmp_path / "far", run=state(status="running"))
    with pytest.raises(RunError, match="runs on another machine"):
        manage.cancel([tmp_path / "far"])
    with pytest.raises(RunError, match="not a run folder"):
        manage.cancel([tmp_path])


def test_resume_takes_what_ended_against_its_users_will(
    tmp_path: Path, jobs: dict[str, JobState], monkeypatch: pytest.MonkeyPatch, keel: Callable[..., Said]
) -> None:
    def make(name: str, **changes: Any) -> None:
        job = submission(f"9{len(list(tmp_path.iterdir()))}")
        make_run(tmp_path / name, run=state(**changes), job=job)

    make("done")
    make("failed", status="failed", error="x")
    make("preempted", status="stopped", attempts=attempts("preempted"))
    make("on-purpose", status="stopped", attempts=attempts("stop_after"))
    make("early", status="stopped", attempts=attempts("early_stop"))
    make("lost", status="running", attempts=attempts())
    make("waiting", status="failed")
    jobs |= {"95": JobState("NODE_FAIL"), "96": JobState("PENDING")}
    submitted: list[list[str]] = []

    def submit(folders: list[Path], cluster: Any, *, parallel: int | None = None) -> list[str]:
        submitted.append([folder.name for folder in folders])
        return [str(number) for number in range(len(folders))]

    monkeypatch.setattr("launch.slurm.submit.submit", submit)
    listed = json.loads(keel("resume", tmp_path, "--dry-run", "--json")[1])
    assert [Path(run["run"]).name for run in listed] == ["failed", "lost", "preempted"]
    assert submitted == []
    code, out, _ = keel("resume", tmp_path, tmp_path / "on-purpose")
    assert code == 0, out
    assert submitted == [["failed", "lost", "preempted", "on-purpose"]]
    for name, why in (("done", "is done"), ("waiting", "is requeued")):
        code, _, err = keel("resume", tmp_path / name)
        assert (code, err) == (2, f"error: {tmp_path / name}: {why}, there is nothing to resume\n")


def test_resume_trains_here_what_was_never_submitted(
    tmp_path: Path, jobs: dict[str, JobState], monkeypatch: pytest.MonkeyPatch, keel: Callable[..., Said]
) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, run=state(status="failed", attempts=attempts()))
    ran: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "launch.ranks.local.launch", lambda folder, n: ran.append((folder.root.name, n)) or 3 * (n == 2)
    )
    assert keel("resume", tmp_path)[0] == 3
    assert ran == [("a", 2), ("b", 2)]
    assert keel("resume", tmp_path, "--nproc", 1)[0] == 0


def test_best_prefers_what_can_be_exported(tmp_path: Path, keel: Callable[..., Said]) -> None:
    for name, (saved, scored) in {
        "a": ([20], {10: {"top1": 99.0}, 20: {"top1": 60.0}}),
        "b": ([10, 20], {10: {"top1": 80.0}, 20: {"top1": 70.0}}),
        "c": ([], {20: {"top1": 75.0}}),
    }.items():
        make_run(tmp_path / name, run=state(), evaluations=scored)
        for step in saved:
            (tmp_path / name / "checkpoints" / f"step-{step:08d}-a01").mkdir()
    ranked = json.loads(keel("best", tmp_path, "--metric", "knn/top1", "--json")[1])
    assert [(Path(one["run"]).name, one["value"], one["step"], one["exportable"]) for one in ranked] == [
        ("b", 80.0, 10, True), ("c", 75.0, 20, False), ("a", 60.0, 20, True)
    ]  # fmt: skip
    assert "no checkpoint of that step" in keel("best", tmp_path, "--metric", "knn/top1")[1]
    assert [
        Path(one["run"]).name for one in json.loads(keel("best", tmp_path, "--metric", "loss", "--json")[1])
    ]
    code, _, err = keel("best", tmp_path, "--metric", "linear/top1")
    assert (code, err) == (
        2, f"error: --metric: no run below {tmp_path} has linear/top1; evaluated were: knn/top1\n"
    )  # fmt: skip


def test_best_gives_nan_no_place_and_says_how_its_runs_stand(
    tmp_path: Path, jobs: dict[str, JobState], keel: Callable[..., Said]
) -> None:
    for name, values in {
        "a-nan": {20: NAN}, "b": {10: 50.0, 20: NAN}, "c": {20: 70.0}, "d-inf": {20: INF}, "e": {20: 40.0},
    }.items():  # fmt: skip
        make_run(tmp_path / name, run=state(), evaluations={n: {"top1": v} for n, v in values.items()})
    make_run(tmp_path / "f", run=state(status="failed", error="x y"), evaluations={20: {"top1": 60.0}})

    def ranked(*more: str) -> list[str]:
        out = keel("best", tmp_path, "--metric", "knn/top1", "--json", *more)[1]
        found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
        assert [one["comparable"] for one in found] == [True] * 4 + [False] * 2
        assert [one["value"] for one in found if not one["comparable"]] == [None, None]
        return [Path(one["run"]).name for one in found]

    assert ranked() == ["c", "f", "b", "e", "a-nan", "d-inf"]
    assert ranked("--lower") == ["e", "b", "f", "c", "a-nan", "d-inf"]
    lines = keel("best", tmp_path, "--metric", "knn/top1")[1].splitlines()
    assert " ".join(lines[1].split()) == "60 step 20 failed f (no checkpoint of that step; x y)"
    assert lines[4].split()[:5] == ["nan", "step", "20", "done", "a-nan"] and "has no place" in lines[4]
    for order in ("-best", "best"):
        out = keel("runs", tmp_path, "--sort", order, "--json")[1]
        found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
        assert [run["name"] for run in found][-2:] == ["a-nan", "d-inf"]
        assert next(run for run in found if run["name"] == "b")["best"]["value"] == 50
    (row,) = [line for line in keel("runs", tmp_path)[1].splitlines() if line.startswith("a-nan")]
    assert "knn/top1 nan" in row
    for name in "bcef":
        shutil.rmtree(tmp_path / name)
    code, _, err = keel("best", tmp_path, "--metric", "knn/top1", "--export", tmp_path / "out")
    assert code == 2 and "finite in none of these runs" in err and not (tmp_path / "out").exists()


def test_losses_that_mean_something_else_arent_ranked_together(
    tmp_path: Path, jobs: dict[str, JobState], keel: Callable[..., Said]
) -> None:
    for name, objective in (("a", "mae"), ("b", "mae"), ("c", "moco")):
        make_run(tmp_path / name, run=state(), objective=objective, rows=10, evaluations={1: {"top1": 1.0}})
    code, _, err = keel("best", tmp_path, "--metric", "loss")
    assert code == 2 and err.startswith("error: --metric: loss of mae and moco can't be compared")
    assert keel("best", tmp_path, "--metric", "knn/top1")[::2] == (0, "")
    shutil.rmtree(tmp_path / "c")
    code, out, err = keel("best", tmp_path, "--metric", "loss", "--json")
    assert (code, err) == (0, "")  # the mean over the last fifth, not one batch's
    assert [one["value"] for one in json.loads(out)] == [pytest.approx((1 / 9 + 1 / 10) / 2)] * 2
    config = tmp_path / "b" / "config.yaml"
    config.write_text(config.read_text().replace("  crop: [0, 1]\n", "  crop: [0, 1]\n  mask_ratio: 0.9\n"))
    config = tmp_path / "a" / "config.yaml"
    config.write_text(config.read_text().replace("  crop: [0, 1]\n", "  crop: [0, 1]\n  mask_ratio: 0.5\n"))
    code, _, err = keel("best", tmp_path, "--metric", "loss")
    assert code == 0 and err.startswith("note: objective.mask_ratio differs among these runs")


def test_watch_ends_with_ctrl_c(tmp_path: Path) -> None:
    make_run(tmp_path / "one", run=state())
    command = [sys.executable, "-m", "launch", "runs", str(tmp_path), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout
        while "1 done" not in watching.stdout.readline():
            pass
        os.kill(watching.pid, signal.SIGINT)
        assert watching.wait(60) == 0
