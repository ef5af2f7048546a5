"""Workers die, ranks die, signals fly: the batches stay the same and no process stays behind."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline import worker
from data_pipeline.assemble import Buffers, Job
from data_pipeline.config import DataConfig
from data_pipeline.load import Loader, build_loader
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Draws
from data_pipeline.pool import WorkerPool
from data_pipeline.quarantine import Broken
from data_pipeline.types import CenterCrop, ViewSpec
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


def in_time(work: Callable[[], None], what: str, seconds: float = 60) -> None:
    """Run `work` in a thread that is given up when it hangs, so that a deadlock is a failing test."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"{what}: nothing after {seconds:g} s"
    if failed:
        raise failed[0]


class QuickAssembler:
    """Stands in for the one that reads and decodes; every third sample is broken: long answers."""

    def __init__(self, job: Job):
        self.job = job

    def fill(self, draws: Draws, out: Buffers, first: int = 0) -> list[Broken]:
        out.seeds[first : first + len(draws)] = torch.from_numpy(draws.seed)
        out.index[first : first + len(draws)] = torch.from_numpy(draws.index)
        bad = [index for index in draws.index.tolist() if index % 3 == 0]
        return [Broken(0, index, "shard.tar", f"{index:09d}", "jpg", "reason " * 20, "x") for index in bad]


class _NoProcess:
    pid = 0

    def poll(self) -> None: ...

    def wait(self, timeout: float | None = None) -> None: ...


class ThreadPool(WorkerPool):
    """Workers are threads over the same sockets and memory: a pool costs a millisecond instead of seconds."""

    def _start(self) -> Any:
        ours, theirs = socket.socketpair()
        theirs.close()
        return _NoProcess(), ours

    def _forked(self) -> Connection:
        ours, theirs = socket.socketpair()

        def serve() -> None:
            try:
                worker._serve(self._setup, self._memory, Connection(theirs.detach()))
            except (EOFError, OSError):
                return

        threading.Thread(target=serve, daemon=True).start()
        return Connection(ours.detach())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 9000),
    workers=st.integers(1, 6),
    prefetch=st.integers(1, 400),
    batches=st.integers(1, 3),
)
@example(rows=8192, workers=2, prefetch=3, batches=4)
@example(rows=4096, workers=1, prefetch=3, batches=2)
@example(rows=1024, workers=1, prefetch=16, batches=2)
@example(rows=1, workers=1, prefetch=900, batches=1)
def test_no_batch_workers_or_prefetch_hang(
    monkeypatch: pytest.MonkeyPatch, rows: int, workers: int, prefetch: int, batches: int
) -> None:
    """Everything ahead is ordered before the first answer is read, as the loader does."""
    prefetch = min(prefetch, 1 + 200_000 // rows)
    monkeypatch.setattr(worker, "Assembler", QuickAssembler)
    job = Job((), (ViewSpec((1, 1), CenterCrop()),), frozenset({"views"}))
    pool = ThreadPool(job, rows, workers=workers, prefetch=prefetch)

    def draws(batch: int) -> Draws:
        index = np.arange(batch * rows, (batch + 1) * rows, dtype=np.int64)
        return Draws(*[np.zeros_like(index)] * 4, index, index + 7)

    def work() -> None:
        ordered = 0
        for number in range(batches):
            while pool.has_room():
                pool.order(draws(ordered))
                ordered += 1
            batch, expected = pool.next(), draws(number)
            assert batch.index.tolist() == expected.index.tolist()
            assert batch.seeds.tolist() == expected.seed.tolist()
            assert {one.index for one in pool.broken} == {i for i in expected.index.tolist() if i % 3 == 0}

    in_time(work, f"{rows} rows, {workers} workers, {prefetch} ahead")
    pool.close()


def test_eight_thousand_rows_a_rank_with_default_workers(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole loader over processes; only reading and decoding are left out."""
    monkeypatch.setattr("data_pipeline.pool._PROGRAM", "from data_pipeline import worker\n"
        "from tests.data_pipeline.test_pool import QuickAssembler\n"
        "worker.Assembler = QuickAssembler\nworker.main()")  # fmt: skip
    config, view = DataConfig(manifest=manifest.path, max_broken=1), ViewSpec((2, 2), CenterCrop())

    def work() -> None:
        began = time.monotonic()
        with build_loader(
            config,
            [view],
            needs=frozenset({"views"}),
            seed=0,
            batch_size=8192,
            rank=0,
            world_size=1,
            position=0,
        ) as batches:
            assert time.monotonic() - began < 10  # no waiting for workers
            for _ in range(4):
                assert len(next(batches)) == 8192

    in_time(work, "8,192 rows")


def test_building_waits_for_nobody(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that starts workers may be stuck in a dead file system: whoever waits does so in `next`."""
    monkeypatch.setattr("data_pipeline.pool._PROGRAM", "import time; time.sleep(3)")
    monkeypatch.setattr("data_pipeline.pool._PATIENCE", 0.2)
    names = [f"shard-{number:06d}.tar" for number in range(30_000)]
    shards = tuple(replace(manifest.shards[0], name=name) for name in names)
    big = Manifest(manifest.directory, shards, manifest.fields, manifest.classes)
    job = Job((big,), (ViewSpec((2, 2), CenterCrop()),), frozenset({"views"}))
    assert len(pickle.dumps(job)) > 1 << 20  # more than any socket takes
    pools: list[WorkerPool] = []
    in_time(lambda: pools.append(WorkerPool(job, 64, workers=2, prefetch=3)), "building", 20)
    monkeypatch.setattr("data_pipeline.pool.log", said := SaidWords())
    index = np.zeros(64, np.int64)
    pools[0].order(Draws(*[index] * 6))
    with pytest.raises((RuntimeError, DataError), match=r"can't start|workers died"):
        in_time(lambda: pools[0].next() and None, "workers that never start")
    assert any("no data for" in line and "shard-000000.tar" in line for line in said.lines)
    pools[0].close()


class SaidWords:
    """A logger that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, form: str, *values: object) -> None:
        self.lines.append(form % values)


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
