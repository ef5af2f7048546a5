"""Workers seen from the training process: tasks out, batches back in the order they were asked for.

A batch is cut into chunks of rows that all workers fill at once, in memory shared with them (an anonymous
file, so /dev/shm's size doesn't matter). Which worker fills which row has no influence on what stands there;
a worker that dies is replaced and its chunks are made again.

Nothing here waits for a worker but `next`. A worker may sleep until its answer is read, so this side must
never sleep until a task is read: both would, for ever. Hence what is to be read lies in the shared memory, a
task is a few bytes that say where, and a worker has no more of them than its socket holds for certain; the
others follow as answers come.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import DataError, UserError
from data_pipeline.assemble import Job
from data_pipeline.plan import Draws
from data_pipeline.quarantine import Broken
from data_pipeline.types import Batch
from data_pipeline.worker import FORK, PID, STATUS, TASK, Done, Failed, Hello, Setup, draws_in

log = logging.getLogger(__name__)

_LEAST_CHUNK, _USUAL_CHUNK = 8, 32  # rows in a task
_UNANSWERED = 64  # tasks a worker may have: enough to be busy while nobody looks, few enough for its socket
_SOCKET_BYTES = 1 << 17  # the kernel counts less than 1 KiB for a task
_PATIENCE = 60.0  # seconds without data before a word about it
_DEATHS = 3  # of workers over one chunk before the run stops
_PROGRAM = "from data_pipeline.worker import main; main()"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class _Task:
    batch: int
    slot: int
    first: int
    rows: int
    deaths: int = 0


@dataclass
class _Pending:
    slot: int
    rows: int
    waiting: int  # chunks that aren't in place yet
    broken: list[Broken] = field(default_factory=list)


@dataclass
class _Worker:
    connection: Connection
    tasks: deque[_Task] = field(default_factory=deque)  # sent, answered in order; up to _UNANSWERED
    pid: int = 0


class WorkerPool:
    """Makes batches of up to `rows` samples in `workers` processes, `prefetch` batches ahead."""

    def __init__(self, job: Job, rows: int, *, workers: int, prefetch: int, pin: bool = False):
        self._job, self._rows, self._pin = job, rows, pin
        self._setup = Setup.of(job, rows)
        size = self._setup.slot_bytes
        # So large that workers can make everything ahead without being spoken to.
        everything = -(-rows * prefetch // (_UNANSWERED * workers))
        self._chunk = max(_LEAST_CHUNK, min(_USUAL_CHUNK, -(-rows // workers)), everything)
        self._memory_file = os.memfd_create("keel-batches", os.MFD_CLOEXEC)
        os.truncate(self._memory_file, size * prefetch)
        self._memory: Tensor = torch.frombuffer(mmap.mmap(self._memory_file, 0), dtype=torch.uint8)
        self._free = deque(range(prefetch))
        self._pending: OrderedDict[int, _Pending] = OrderedDict()
        self._ordered = 0  # batches so far
        self._unsent: deque[_Task] = deque()
        self._error: BaseException | None = None
        self.broken: list[Broken] = []  # in the batch given last
        self.restarts = 0
        self._nursery, self._control = self._start()
        self._workers = [_Worker(self._forked()) for _ in range(workers)]

    def pids(self) -> list[int]:
        """The workers that have said hello."""
        return [worker.pid for worker in self._workers if worker.pid]

    def idle(self) -> bool:
        """Whether no batch is being made."""
        return not self._pending

    def has_room(self) -> bool:
        """Whether another batch may be ordered."""
        return bool(self._free)

    def order(self, draws: Draws) -> None:
        """Have a batch made; batches come back from `next` in this order. Never waits."""
        number, slot = self._ordered, self._free.popleft()
        self._ordered += 1
        draws_in(self._slot(slot), self._rows)[: len(draws)] = draws.rows()
        starts = range(0, len(draws), self._chunk)
        self._pending[number] = _Pending(slot, len(draws), len(starts))
        self._unsent += [_Task(number, slot, at, min(self._chunk, len(draws) - at)) for at in starts]
        self._feed()

    def next(self) -> Batch:
        """The oldest batch ordered, once it is whole. Raises what a worker raised for it."""
        number, pending = next(iter(self._pending.items()))
        last_word = time.monotonic()
        while pending.waiting and self._error is None:
            if not self._collect(_PATIENCE):
                log.warning("%s", self._delay(time.monotonic() - last_word))
        if self._error is not None:
            raise self._error
        del self._pending[number]
        whole = self._setup.buffers(self._slot(pending.slot))
        batch = whole.copied(pending.rows, self._pin)
        self.broken = pending.broken
        self._free.append(pending.slot)
        return batch

    def close(self) -> None:
        """End the workers at once. Harmless when repeated."""
        if self._memory_file < 0:
            return
        self._stop_nursery()
        for worker in self._workers:
            worker.connection.close()
        os.close(self._memory_file)
        self._memory_file = -1

    def __del__(self) -> None:
        if getattr(self, "_memory_file", -1) >= 0 and hasattr(self, "_workers"):
            self.close()

    def _slot(self, number: int) -> Tensor:
        return self._memory[number * self._setup.slot_bytes : (number + 1) * self._setup.slot_bytes]

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The process that forks workers; see `worker`. Doesn't wait for it."""
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONPATH": path}
        # The setup of many shards is larger than a socket: through a file nobody waits for the other.
        with theirs, os.fdopen(os.memfd_create("keel-setup"), "wb") as setup:
            pickle.dump(self._setup, setup)
            setup.flush()
            handles = (theirs.fileno(), self._memory_file, setup.fileno())
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *map(str, handles)],
                stdin=subprocess.DEVNULL,
                pass_fds=handles,
                env=environment,
            )
        return process, ours

    def _forked(self) -> Connection:
        """A new worker's connection. Doesn't wait for the worker."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        with theirs:
            try:
                socket.send_fds(self._control, [FORK], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return Connection(ours.detach())

    def _stop_nursery(self) -> None:
        self._control.close()
        try:
            self._nursery.wait(5)
        except subprocess.TimeoutExpired:  # still importing, or stuck in a dead file system
            self._nursery.kill()
            self._nursery.wait()

    def _feed(self) -> None:
        """Send tasks to those who have fewest, as long as somebody may have more."""
        while self._unsent:
            worker = min(self._workers, key=lambda one: len(one.tasks))
            if len(worker.tasks) >= _UNANSWERED:
                return
            self._send(worker, self._unsent.popleft())

    def _send(self, worker: _Worker, task: _Task) -> None:
        worker.tasks.append(task)
        try:
            worker.connection.send_bytes(TASK.pack(task.batch, task.slot, task.first, task.rows))
        except (BrokenPipeError, ConnectionResetError):
            self._replace(worker)

    def _collect(self, timeout: float) -> bool:
        """Take in what workers have to say; False where nobody spoke in time."""
        by_connection = {worker.connection: worker for worker in self._workers}
        ready = wait(list(by_connection), timeout)
        for connection in ready:
            worker = by_connection[connection]  # type: ignore[index]
            try:
                reply = pickle.loads(worker.connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                self._replace(worker)
                continue
            self._take(worker, reply)
        self._feed()
        return bool(ready)

    def _take(self, worker: _Worker, reply: Hello | Done | Failed) -> None:
        match reply:
            case Hello(pid):
                worker.pid = pid
            case Done(batch, broken):
                worker.tasks.popleft()
                self._pending[batch].waiting -= 1
                self._pending[batch].broken += broken
            case Failed(_, error, trace):
                worker.tasks.popleft()
                self._error = error or RuntimeError(f"a data worker failed:\n{trace}")

    def _replace(self, worker: _Worker) -> None:
        """Put a new worker in a dead one's place and send it the chunks that weren't answered."""
        self.restarts += 1
        tasks, worker.tasks = worker.tasks, deque()
        worker.connection.close()
        if not worker.pid and self._nursery.poll() is not None:
            self._error = RuntimeError("data workers can't start; their output says why")
            return
        log.warning("data worker %d died (%s); its samples are made again", worker.pid, self._cause(worker))
        if tasks:
            tasks[0].deaths += 1
            if tasks[0].deaths >= _DEATHS:
                self._error = self._given_up(tasks[0])
                return
        worker.pid = 0
        try:
            worker.connection = self._forked()
        except OSError:  # the forking process is gone too
            self._stop_nursery()
            self._nursery, self._control = self._start()
            worker.connection = self._forked()
        for task in tasks:
            self._send(worker, task)

    def _cause(self, worker: _Worker) -> str:
        if not worker.pid:
            return "before it had started"
        try:
            self._control.sendall(STATUS + PID.pack(worker.pid))
            answer = self._control.recv(PID.size, socket.MSG_WAITALL)
        except OSError:
            answer = b""
        if len(answer) < PID.size:
            return "with the process that starts workers"
        (code,) = PID.unpack(answer)
        if code == -signal.SIGKILL:
            return "killed: out of memory?"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def _given_up(self, task: _Task) -> UserError:
        return DataError(
            f"{_DEATHS} data workers died over the same samples: {self._where(task)}; a worker's memory ran "
            "out or a decoder crashed: lower data.workers, or look at these with keel data verify"
        )

    def _delay(self, seconds: float) -> str:
        waiting = sorted({self._where(worker.tasks[0]) for worker in self._workers if worker.tasks})
        return f"no data for {seconds:.0f} s; workers are at {'; '.join(waiting) or 'nothing'}"

    def _where(self, task: _Task) -> str:
        """The shards of a chunk, by name."""
        rows = draws_in(self._slot(task.slot), self._rows)[task.first : task.first + task.rows]
        draws = Draws.from_rows(rows)
        places = sorted(set(zip(draws.source.tolist(), draws.shard.tolist(), strict=True)))
        names = [self._job.manifests[source].shards[shard].name for source, shard in places]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
