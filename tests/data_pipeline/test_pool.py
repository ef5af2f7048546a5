"""Workers die, ranks die, signals fly: the batches stay the same and no process stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import DataError
from data_pipeline.load import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.pool import WorkerPool
from tests.data_pipeline.sets import numbered_set
from tests.data_pipeline.test_load import equal, loader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return numbered_set(tmp_path_factory.mktemp("set"), [40, 40])


def pool(batches: Loader) -> WorkerPool:
    assert isinstance(batches._maker, WorkerPool)
    return batches._maker


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(condition: object, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def test_dead_workers_are_replaced_and_their_samples_made_again(manifest: Manifest) -> None:
    """Workers and even the process that forks them are killed, also one that fell asleep over its task."""
    with loader(manifest) as plain, loader(manifest, workers=2) as batches:
        assert equal(next(batches), next(plain))
        workers = pool(batches)
        os.kill(workers._workers[0].pid, signal.SIGKILL)
        os.kill(workers._workers[1].pid, signal.SIGSEGV)
        for _ in range(8):
            assert equal(next(batches), next(plain))
        os.kill(workers._nursery.pid, signal.SIGKILL)
        for _ in range(8):
            assert equal(next(batches), next(plain))
        assert workers.restarts >= 3


def test_a_chunk_that_kills_every_worker_stops_the_run(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.pool._PROGRAM", "import os; from data_pipeline import worker\n"
        "worker.Assembler.fill = lambda *_: os.kill(os.getpid(), 9)\nworker.main()")  # fmt: skip
    told = r"3 data workers died over the same samples: shard-00000\d.tar"
    with loader(manifest, workers=1) as batches, pytest.raises(DataError, match=told):
        next(batches)


def test_our_own_mistake_keeps_its_trace(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.pool._PROGRAM", "from data_pipeline import worker\n"
        "worker.Assembler.fill = lambda *_: 1 / 0\nworker.main()")  # fmt: skip
    with loader(manifest, workers=1) as batches, pytest.raises(RuntimeError, match="ZeroDivisionError"):
        next(batches)


def test_workers_that_cant_start_are_said_so(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_pipeline.pool._PROGRAM", "raise SystemExit('broken installation')")
    with loader(manifest, workers=1) as batches, pytest.raises(RuntimeError, match="can't start"):
        next(batches)
    assert "broken installation" in capfd.readouterr().err


def test_closing_ends_every_process_at_once(manifest: Manifest) -> None:
    batches = loader(manifest, workers=2)
    next(batches)
    pids = [pool(batches)._nursery.pid, *(worker.pid for worker in pool(batches)._workers)]
    assert all(alive(pid) for pid in pids)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 2 and until(lambda: not any(alive(pid) for pid in pids), 2)
    assert len(os.listdir("/proc/self/fd")) < descriptors  # noqa: PTH208
    batches.close()


def test_signals_to_the_whole_group_leave_workers_at_work(manifest: Manifest) -> None:
    with loader(manifest) as plain, loader(manifest, workers=1) as batches:
        assert equal(next(batches), next(plain))
        for pid in (pool(batches)._nursery.pid, pool(batches)._workers[0].pid):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                os.kill(pid, number)
        for _ in range(6):
            assert equal(next(batches), next(plain))
        assert pool(batches).restarts == 0


RANK = """
import sys, time
from tests.data_pipeline.test_load import loader
from tests.data_pipeline.test_pool import pool
from data_pipeline.manifest import Manifest
batches = loader(Manifest.load(sys.argv[1]), workers=2)
next(batches)
print(pool(batches)._nursery.pid, *(worker.pid for worker in pool(batches)._workers), flush=True)
time.sleep(60)
"""


def test_workers_dont_outlive_a_killed_rank(manifest: Manifest) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RANK, str(manifest.path)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert rank.stdout is not None
    pids = [int(word) for word in rank.stdout.readline().split()]
    assert len(pids) == 3 and all(alive(pid) for pid in pids)
    rank.kill()
    rank.wait()
    rank.stdout.close()
    assert until(lambda: not any(alive(pid) for pid in pids), 5)
