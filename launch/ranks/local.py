"""Ranks on this machine: one in this process, several as processes of their own.

torch.distributed's elastic process layer isn't used for the several: it takes every exit code but 0 for a
failure (ours has 3 for "stopped with a checkpoint"), and answers one by sending SIGTERM to the others, which
asks ours for a collective save they can no longer make. Its rendezvous is used: the launcher holds the store,
so no port has to be guessed.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from configs.loading import load
from launch.ranks.job import DONE, HUNG, LAUNCHER, LOST_PEER, MEANING, OUR_FAULT, STOPPED, USERS_INPUT, job
from launch.ranks.logs import rank_log

if TYPE_CHECKING:
    from pretrain.config import RunSection
    from pretrain.run.folder import RunFolder

GRACE = 3.0
"""Seconds that the other ranks have to say what they saw after one has failed."""

SHOWN = 20
"""Lines of a failed rank's log shown on the console."""


def launch(folder: RunFolder, nproc: int, *, apart: bool = False, last: bool = False) -> int:
    """Train the prepared run in `folder` with `nproc` ranks; gives the exit code.

    Output of rank 0 is shown, that of every rank lies in RUN/logs. Ctrl-C, SIGTERM and SIGUSR2 reach every
    rank once and end the run with a checkpoint; a second Ctrl-C ends it at once. Where a rank was killed or
    hung, all are started again, `train.health.restarts` times at most; a single rank runs in this process,
    and can't be, unless it is to run `apart`: DeepSpeed remembers its process group, so that a second run
    in the same process fails. `last`: nothing comes after it in this process (see `launch.ranks.job.job`).
    """
    if nproc == 1 and not apart:
        return job(folder.root, last=last).code
    from pretrain.config import RunConfig

    config = load(folder.config_file, RunConfig)
    left = config.train.health.restarts
    while True:
        code, again = _once(folder, nproc, config.run, last)
        if not again or not left:
            return code
        left -= 1
        print(f"starting again from the newest checkpoint; {left} restarts are left", file=sys.stderr)


def _once(folder: RunFolder, nproc: int, run: RunSection, last: bool) -> tuple[int, bool]:
    """One start of all ranks: the exit code, and whether another start may help."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not listed in __all__

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": str(run.threads),
        # Name resolution can take gloo 20 s where DNS doesn't answer; ranks of one machine don't need it.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }  # fmt: skip
    if run.device == "cpu":
        shared["CUDA_VISIBLE_DEVICES"] = ""  # no context, no pinned memory on GPUs that others may be using
    # -P: a folder named `configs` where the user stands must not hide ours.
    command = [sys.executable, "-P", "-m", "launch.ranks.job", str(folder.root)]
    return supervised(command, nproc, folder.logs, shared, last)


def supervise(command: Sequence[str], nproc: int, logs: Path, environment: Mapping[str, str]) -> int:
    """Run `command` as `nproc` ranks until all have ended, leave no process behind, give the exit code."""
    return supervised(command, nproc, logs, environment)[0]


def supervised(
    command: Sequence[str], nproc: int, logs: Path, environment: Mapping[str, str], last: bool = False
) -> tuple[int, bool]:
    """As `supervise`; also gives whether to start again: a rank was killed or hung, and not in error."""
    ranks = _start(command, nproc, environment)
    try:
        with _forwarding(ranks, last) as forwarded:
            first = _wait(ranks)
    finally:
        for rank in ranks:
            rank.end()
    if forwarded.hurried:
        return 128 + signal.SIGINT, False
    if first is None:
        return max(rank.code for rank in ranks), False
    _report(first, ranks, logs)
    again = (first.code < 0 or first.code in (HUNG, LOST_PEER)) and not forwarded.asked
    return first.code if first.code == USERS_INPUT else OUR_FAULT, again


@dataclass
class Rank:
    """One rank's process, the leader of a session of its own."""

    number: int
    process: subprocess.Popen[bytes]

    @property
    def code(self) -> int:
        """Exit code, negative for the signal that killed it."""
        assert self.process.returncode is not None
        return self.process.returncode

    @property
    def failed(self) -> bool:
        return self.code < 0 or self.code in (OUR_FAULT, USERS_INPUT) or self.code > STOPPED

    def send(self, number: int) -> None:
        # Not Popen.send_signal: that may reap, and an unreaped process keeps its id from being given away.
        if self.process.returncode is None:
            os.kill(self.process.pid, number)

    def end(self) -> None:
        """Kill the process and whatever it started that is left, and reap it."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _start(command: Sequence[str], nproc: int, environment: Mapping[str, str]) -> list[Rank]:
    # Blocked signals stay blocked in a new process: none can hit a rank before it listens (job.py).
    before = signal.pthread_sigmask(signal.SIG_BLOCK, MEANING)
    ranks: list[Rank] = []
    try:
        for number in range(nproc):
            own = {"RANK": str(number), "LOCAL_RANK": str(number), LAUNCHER: str(os.getpid())}
            process = subprocess.Popen(
                command,
                env=os.environ | dict(environment) | own,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on once
            )
            ranks.append(Rank(number, process))
    except BaseException:
        for rank in ranks:
            rank.end()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ranks


@dataclass
class _Forwarded:
    asked: bool = False  # by any signal to leave
    interrupted: bool = False
    hurried: bool = False  # a second Ctrl-C


@contextmanager
def _forwarding(ranks: Sequence[Rank], last: bool) -> Iterator[_Forwarded]:
    state = _Forwarded()

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and state.interrupted:
            state.hurried = True
            for rank in ranks:
                rank.send(signal.SIGKILL)
            return
        state.asked = True
        state.interrupted |= number == signal.SIGINT
        for rank in ranks:
            rank.send(number)

    before = {number: signal.getsignal(number) for number in MEANING}
    for number in MEANING:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        yield state
    finally:
        well = last and all(rank.process.poll() in (DONE, STOPPED) for rank in ranks)
        for number, handler in before.items():
            # Ranks have saved and left: a signal that comes now must not make a failure of it.
            signal.signal(number, signal.SIG_IGN if well else handler)


def _wait(ranks: Sequence[Rank]) -> Rank | None:
    """Until all have ended, or one has failed and the grace is over; gives the first that failed."""
    first: Rank | None = None
    deadline = float("inf")
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(os.pidfd_open(rank.process.pid), selectors.EVENT_READ, rank)
        while selector.get_map() and time.monotonic() < deadline:
            ready = selector.select(min(1.0, max(0.0, deadline - time.monotonic())))
            for key, _ in ready:
                selector.unregister(key.fileobj)
                os.close(key.fd)
                key.data.end()
            # A killed rank tears its peers down with it: of those that ended together, it was the first.
            failed = sorted((key.data for key, _ in ready if key.data.failed), key=lambda rank: rank.code)
            if failed and first is None:
                first, deadline = failed[0], time.monotonic() + GRACE
        for key in list(selector.get_map().values()):
            os.close(key.fd)
    return first


def _report(first: Rank, ranks: Sequence[Rank], logs: Path) -> None:
    """Say which rank failed first and why. What rank 0 wrote has been on the console already."""
    if first.code == USERS_INPUT and ranks[0].code == USERS_INPUT:
        return
    log = rank_log(logs, first.number)
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    if first.code == USERS_INPUT:
        print(*[line for line in lines[-SHOWN:] if line.startswith("error: ")], sep="\n", file=sys.stderr)
        return
    if first.number != 0 or first.code < 0:
        print(*[f"  {line}" for line in lines[-SHOWN:]], sep="\n", file=sys.stderr)
    how = f"exit code {first.code}"
    if first.code == HUNG:
        how = "stood still"
    if first.code < 0:
        how = f"killed by {signal.Signals(-first.code).name}"
        how += ", perhaps for lack of memory" if first.code == -signal.SIGKILL else ""
    print(f"rank {first.number} failed first ({how}); the whole log: {log}", file=sys.stderr)
