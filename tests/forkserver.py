"""Ranks for tests at the price of a fork: a process imports torch, DeepSpeed and keel, then forks each case.

The pytest process itself isn't forked: it has threads. Started by the `ranks` fixture (tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE = 3.0
"""Seconds the other ranks get once one has failed."""


@dataclass(frozen=True)
class Died:
    """In place of a result: the rank ended by a signal, or left without a word (signal 0)."""

    signal: int


class RankFailureError(Exception):
    """Carries the traceback and output of the ranks that failed."""


@dataclass(frozen=True)
class Case:
    """What one call of the fixture asks for."""

    ranks: int
    file: str
    function: str
    arguments: dict[str, Any]
    timeout: float


@dataclass(frozen=True)
class Outcome:
    """What a rank came to."""

    result: Any = None
    error: BaseException | None = None
    traceback: str = ""
    ended: float = 0.0  # time.monotonic() of the error


class ForkServer:
    """Client side: starts the server with the first case, and stops it with `close`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self,
        ranks: int,
        function: Callable[..., Any],
        /,
        *,
        timeout: float = 60.0,
        may_die: bool = False,
        **arguments: Any,
    ) -> list[Any]:
        """Call `function(**arguments)` on every rank; gives the results in order of rank.

        `function` is at the top of its module; what it gives must pickle. A rank's exception is raised here.
        A rank that was killed raises `RankFailureError`. With `may_die` neither raises: the result is
        `Died` or the exception.
        """
        file = function.__code__.co_filename
        outcomes, output = self._ask(Case(ranks, file, function.__name__, arguments, timeout))
        failures = [
            (outcome.ended, rank, outcome)
            for rank, outcome in enumerate(outcomes)
            if isinstance(outcome, Outcome) and outcome.error is not None
        ]
        if failures and not may_die:  # the first is the cause, the others lost their peer
            _, rank, first = min(failures, key=lambda failure: failure[:2])
            assert first.error is not None
            raise first.error from RankFailureError(
                f"rank {rank} of {ranks}:\n{first.traceback}\noutput of all ranks:\n{output[-4000:]}"
            )
        dead = [rank for rank, outcome in enumerate(outcomes) if isinstance(outcome, Died)]
        if dead and not may_die:
            raise RankFailureError(
                f"ranks {dead} of {ranks} died or ran past {timeout} s; output:\n{output[-4000:]}"
            )
        return [o if isinstance(o, Died) else o.error or o.result for o in outcomes]

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait(30)
            self._process.stdout.close()

    def _ask(self, case: Case) -> tuple[list[Outcome | Died], str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        _send(self._process.stdin, pickle.dumps(case))
        answer = _receive(self._process.stdout)
        if answer is None:
            raise RankFailureError(f"the fork server ended with {self._process.wait()}")
        answers, output = pickle.loads(answer)
        return [a if isinstance(a, Died) else _outcome(a) for a in answers], output


def _outcome(pickled: bytes) -> Outcome:
    outcome = pickle.loads(pickled)
    assert isinstance(outcome, Outcome)
    return outcome


def _send(stream: Any, message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little") + message)
    stream.flush()


def _receive(stream: Any) -> bytes | None:
    header = stream.read(8)
    return stream.read(int.from_bytes(header, "little")) if len(header) == 8 else None


# ---- the server ------------------------------------------------------------------------------


def serve() -> None:
    """Answer cases on stdin until it closes. Runs in a process of its own."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but answers goes to the client
    _preload()
    while (request := _receive(requests)) is not None:
        _send(answers, pickle.dumps(_run(pickle.loads(request))))


def _preload() -> None:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    from pretrain.encoders.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  pulls torch._inductor, a second per rank
    import sklearn.linear_model  # noqa: F401
    import timm  # noqa: F401

    import pretrain.engines.deepspeed  # noqa: F401


def _run(case: Case) -> tuple[list[bytes | Died], str]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        output.touch()
        port, gate = _free_port(), Gate()
        pids = [_fork(case, rank, port, Path(folder), gate) for rank in range(case.ranks)]
        statuses = _wait(pids, case.timeout, gate)
        answers: list[bytes | Died] = []
        for rank, status in enumerate(statuses):
            said = Path(folder) / str(rank)
            answers.append(said.read_bytes() if said.exists() else Died(max(0, -status)))
        return answers, output.read_text(errors="replace")


class Gate:
    """Ranks that have answered stay until every rank has answered or ended.

    Otherwise one that is done first takes the store with it while another still connects to it.
    """

    def __init__(self) -> None:
        self.answered, self._answer = os.pipe()
        self._opened, self._hold = os.pipe()

    def stay(self) -> None:
        """In a rank, once it has answered."""
        os.close(self._hold)
        os.write(self._answer, b".")
        os.read(self._opened, 1)

    def open(self) -> None:
        """In the server: everybody may leave."""
        for descriptor in (self.answered, self._answer, self._opened, self._hold):
            os.close(descriptor)


def _wait(pids: list[int], timeout: float, gate: Gate) -> list[int]:
    """Exit codes; kills what is left after `timeout`, or shortly after another one failed."""
    descriptors = {os.pidfd_open(pid): pid for pid in pids}
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    staying = 0
    while staying < len(descriptors):
        left = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([*descriptors, gate.answered], [], [], left)
        if gate.answered in ready:
            staying += len(os.read(gate.answered, len(pids)))
        for descriptor in [d for d in descriptors if d in ready or not ready]:
            pid = descriptors.pop(descriptor)
            if not ready:
                os.kill(pid, signal.SIGKILL)
            codes[pid] = _reap(descriptor, pid)
            if codes[pid] != 0:
                deadline = min(deadline, time.monotonic() + GRACE)
    gate.open()
    for descriptor, pid in descriptors.items():
        codes[pid] = _reap(descriptor, pid)
    return [codes[pid] for pid in pids]


def _reap(descriptor: int, pid: int) -> int:
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(case: Case, rank: int, port: int, folder: Path, gate: Gate) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the server
        if os.getppid() != parent:
            os._exit(1)
        code = _be_a_rank(case, rank, port, folder)
        if code == 0:
            gate.stay()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _be_a_rank(case: Case, rank: int, port: int, folder: Path) -> int:
    log = os.open(folder / "output", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks), LOCAL_WORLD_SIZE=str(case.ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        outcome = Outcome(_function(case.file, case.function)(**case.arguments))
        message = pickle.dumps(outcome)
    except BaseException as error:
        text, ended = traceback.format_exc(), time.monotonic()
        try:
            message = pickle.dumps(Outcome(None, error.with_traceback(None), text, ended))
            pickle.loads(message)
        except Exception:
            message = pickle.dumps(Outcome(None, RuntimeError(repr(error)), text, ended))
    beside = folder / f".{rank}"
    beside.write_bytes(message)
    beside.rename(folder / str(rank))
    return 0 if pickle.loads(message).error is None else 1


def _function(file: str, name: str) -> Callable[..., Any]:
    """By file, as test modules have no importable name of their own."""
    # Names of files repeat between folders.
    module_name = "_forked_" + "_".join(Path(file).with_suffix("").parts[1:])
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    function = getattr(sys.modules[module_name], name)
    assert callable(function)
    return function  # type: ignore[no-any-return]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.forkserver import serve as serve_by_name  # so that what is pickled has one name on both sides

    serve_by_name()
