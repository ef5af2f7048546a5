"""The processes that make batches: a clean one that forks workers, and the workers.

`pool` starts the first process by exec, so nothing of the training process (threads, CUDA, locks, gloo
sockets) is in it; it imports once and stays single-threaded, so forking workers from it is safe and takes
milliseconds.

Ctrl-C and SLURM's signals go to every process of a job. These ignore them: the rank needs its workers until
it has saved. They end when the rank closes its socket or dies, and at once.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from configs.errors import UserError, fault_of_place
from data_pipeline.assemble import Assembler, Buffers, Job
from data_pipeline.hashing import Int64s
from data_pipeline.plan import Draws
from data_pipeline.quarantine import Broken

FORK, STATUS = b"F", b"S"
TASK = struct.Struct("<qqqq")  # batch, slot, first row, number of rows
PID = struct.Struct("<q")
_DRAWS_BYTES = 6 * 8  # of a row of `Draws.rows`
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What the forking process is told first. A slot of memory holds what a batch draws, then the batch."""

    job: Job
    rows: int  # of a batch
    slot_bytes: int

    @classmethod
    def of(cls, job: Job, rows: int) -> Setup:
        needed = rows * _DRAWS_BYTES + Buffers.size(job, rows)
        return cls(job, rows, -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE)

    def buffers(self, slot: Tensor) -> Buffers:
        """The batch in a slot, (slot_bytes,) uint8."""
        first = self.rows * _DRAWS_BYTES
        return Buffers(self.job, self.rows, slot[first : first + Buffers.size(self.job, self.rows)])


@dataclass(frozen=True)
class Hello:
    """A worker's first message."""

    pid: int


@dataclass(frozen=True)
class Done:
    """Rows are in place; `broken` were replaced."""

    batch: int
    broken: list[Broken]


@dataclass(frozen=True)
class Failed:
    """Rows can't be made: `error` is the user's, or else `trace` is ours."""

    batch: int
    error: UserError | None
    trace: str


def draws_in(slot: Tensor, rows: int) -> Int64s:
    """(rows, 6) int64 as `Draws.rows`: what a slot's batch draws, in the slot's own memory."""
    found: Int64s = slot[: rows * _DRAWS_BYTES].view(torch.int64).view(rows, -1).numpy()
    return found


def main() -> None:
    """Fork workers on request until the rank closes the socket; then end them all.

    Arguments: the numbers of the open socket, of the memory file and of the file with the pickled `Setup`.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    control, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    setup = _setup(int(sys.argv[3]))
    shared = torch.frombuffer(mmap.mmap(memory, 0), dtype=torch.uint8)
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    while True:
        try:
            command, handles, _, _ = socket.recv_fds(control, 1, 1)
        except OSError:
            command, handles = b"", []
        if command == FORK:
            parent = os.getpid()
            child = os.fork()
            if child == 0:
                control.close()
                _run(setup, shared, handles[0], parent)
            os.close(handles[0])
            children.add(child)
        elif command == STATUS:
            (child,) = PID.unpack(control.recv(PID.size, socket.MSG_WAITALL))
            children.discard(child)
            control.sendall(PID.pack(_status(child)))
        else:
            for child in children:
                os.kill(child, signal.SIGKILL)
            os._exit(0)


def _setup(handle: int) -> Setup:
    with os.fdopen(handle, "rb") as file:
        file.seek(0)
        setup = pickle.load(file)
    assert isinstance(setup, Setup)
    return setup


def _status(child: int) -> int:
    """How a dead worker ended: -signal, or its exit status."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:
        return 0


def _run(setup: Setup, shared: Tensor, handle: int, parent: int) -> None:
    """A worker's life. Never returns."""
    code = 1
    try:
        _die_with_parent(parent)
        _serve(setup, shared, Connection(handle))
        code = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _die_with_parent(parent: int) -> None:
    """Be killed when the forking process ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _serve(setup: Setup, shared: Tensor, connection: Connection) -> None:
    assembler = Assembler(setup.job)
    slots = torch.split(shared, setup.slot_bytes)
    draws, buffers = [draws_in(slot, setup.rows) for slot in slots], [setup.buffers(slot) for slot in slots]
    connection.send_bytes(pickle.dumps(Hello(os.getpid())))
    while True:
        batch, slot, first, rows = TASK.unpack(connection.recv_bytes())
        part = Draws.from_rows(draws[slot][first : first + rows])
        reply: Done | Failed
        try:
            reply = Done(batch, assembler.fill(part, buffers[slot], first))
        except UserError as error:
            reply = Failed(batch, error, "")
        except Exception as error:
            known = fault_of_place(error) if isinstance(error, OSError) else None
            reply = Failed(batch, known, traceback.format_exc())
        connection.send_bytes(pickle.dumps(reply))
