"""What each task of a job does: it is one rank of the run, and knows what its end means to SLURM.

done, or stopped on purpose        the task returns: the job is completed
SIGUSR2 (the time limit is near)   all ranks save together and leave with REQUEUE: the job runs again
SIGTERM (preempted, or cancelled)  save, then wait for what SLURM does about it; a cancelled run stays away
a peer is gone                     wait for SLURM, which ends or requeues the job; at last ask for a requeue
an error                           raised: the job has failed
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from configs.errors import RunError
from configs.loading import load
from launch.ranks.job import DONE, LOST_PEER, MEANING, STOPPED, job
from launch.ranks.logs import rank_log
from launch.runs import queue
from launch.slurm import executor, nodes
from launch.slurm.incarnation import Incarnation, leave_when_superseded
from launch.slurm.submission import Submission

VERDICT = 600.0
"""Seconds SLURM is given to notice that a node is gone (SlurmdTimeout is 300 unless a site changed it)."""

MARGIN = 15.0
"""Seconds before the end at which a save that isn't finished is given up: the requeue must not be lost"""

KILL_WAIT = 60.0
"""Seconds after SIGTERM in which SLURM would have killed the job (KillWait is 30 by default)."""


class TaskFailedError(Exception):
    """Ends a task so that the job counts as failed. Carries the end of the rank's log."""


@dataclass(frozen=True)
class Train:
    """One rank of the run in `root`. Pickled by submitit, by its name."""

    root: str
    signal_delay: float  # seconds from SIGUSR2 to the end of the job
    ranks: int
    gpus_per_node: int = 0
    excluded: str = ""  # nodes that the cluster's config rules out
    submission: int = 0  # which one of the run's this is, counted from 1

    def __call__(self) -> dict[str, Any]:
        here = executor.place()
        try:
            found = self._train(here)
        except BaseException as error:
            # The other ranks are killed for it, and the job's exit code may be theirs.
            here.mark(executor.FAILED, f"rank {here.rank}: {str(error).splitlines()[:1]}")
            raise
        for number in MEANING:  # what comes now comes too late: all is saved
            signal.signal(number, signal.SIG_IGN)
        return found

    def _train(self, here: executor.Place) -> dict[str, Any]:
        root = Path(self.root)
        _hold_signals()
        self._require_allocation(here)
        Deadline(max(self.signal_delay - MARGIN, self.signal_delay / 2)).start()
        os.environ.update(here.environment())
        if (mine := Incarnation.mine(self.submission)) is not None:
            if here.rank == 0:
                mine.announce(root)
            leave_when_superseded(root, mine)
        os.environ.setdefault("OMP_NUM_THREADS", _threads(root))
        if here.rank == 0:
            self._prepare(root, here)
        outcome = job(root, hung=lambda: leave(executor.REQUEUE))
        if outcome.code == DONE or outcome.reason in ("stop_after", "early_stop"):
            return {"reason": outcome.reason}
        if outcome.code == STOPPED and outcome.reason not in ("preempted", "time_limit"):
            wait_for_slurm(root, KILL_WAIT)
            return {"reason": outcome.reason}
        if outcome.code == LOST_PEER:
            wait_for_slurm(root, VERDICT)
        if outcome.code in (STOPPED, LOST_PEER):
            if cancelled(root):
                return {"reason": "cancelled"}
            leave(executor.REQUEUE)
        raise TaskFailedError(f"rank {here.rank} failed:\n{_end_of_log(root, here.rank)}")

    def _require_allocation(self, here: executor.Place) -> None:
        """Raises `RunError` where SLURM has given something else than the cluster's config asks for."""
        if here.world_size != self.ranks:
            raise RunError(
                f"nodes, tasks_per_node: the cluster's config makes {self.ranks} ranks, but SLURM has "
                f"started {here.world_size} on {', '.join(here.hosts)}; set both as the job gets them"
            )
        if not self.gpus_per_node:
            return
        import torch

        if (seen := torch.cuda.device_count()) < here.local_world_size:
            raise RunError(
                f"gpus_per_node: found {self.gpus_per_node}, but {seen} can be seen on {platform.node()}; "
                "each rank there needs one: look at the node's driver, the partition, and torch's build"
            )

    def _prepare(self, root: Path, here: executor.Place) -> None:
        """What one rank does for all before training: the time that is left, and nodes that fail."""
        from pretrain.run.attempt import JOB_ENDS

        if (left := queue.time_left(here.job)) is not None:
            os.environ[JOB_ENDS] = str(time.time() + left)
        if bad := nodes.bad(root, here.hosts):
            listed = ",".join(filter(None, [self.excluded, *bad]))
            name = os.environ.get("SLURM_JOB_ID", here.job)
            (here.folder / f"{name}.{executor.EXCLUDED}").write_text(listed)
            print(f"leaving for other nodes: {', '.join(bad)} failed twice under this run", file=sys.stderr)
            leave(executor.REQUEUE)


class Deadline(threading.Thread):
    """Leaves with REQUEUE when `seconds` have passed since SIGUSR2 and the process is still there.

    A save may then still be going on; the next attempt sweeps its unfinished folder. The signal is heard
    through a pipe, which Python's C handler writes to even while the main thread is stuck in a collective.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(name="deadline", daemon=True)
        self.seconds = seconds
        self._heard, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def run(self) -> None:
        while signal.SIGUSR2 not in os.read(self._heard, 64):
            pass
        time.sleep(self.seconds)
        os.write(2, b"the time is up and the run hasn't left: going without its last checkpoint\n")
        leave(executor.REQUEUE)


def _hold_signals() -> None:
    """Hold signals back until the rank listens, and put submitit's handlers out of office."""

    def noted(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{signal.Signals(number).name}: training isn't going on\n".encode())

    signal.pthread_sigmask(signal.SIG_BLOCK, MEANING)
    for number in (*MEANING, signal.SIGCONT):
        signal.signal(number, noted)


def leave(code: int) -> NoReturn:
    """End this process at once: no result is pickled, so that nobody takes the job for finished."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_slurm(root: Path, seconds: float) -> None:
    """Give SLURM `seconds` to end or requeue this job; a run that was cancelled doesn't wait."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not cancelled(root):
        time.sleep(min(1, seconds))


def cancelled(root: Path) -> bool:
    """Whether the user asked that the run stay away."""
    record = Submission.of(root)
    return record is not None and record.cancelled is not None


def _threads(root: Path) -> str:
    from pretrain.config import RunConfig

    return str(load(root / "config.yaml", RunConfig).run.threads)


def _end_of_log(root: Path, rank: int, lines: int = 20) -> str:
    try:
        return "\n".join(rank_log(root / "logs", rank).read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return str(error)
