"""Which start of which job a run belongs to: RUN/incarnation.json.

After a network cut SLURM runs a job again while the old start may still be alive on the other side, for a
minute and more. The newer start writes down who it is; every rank of an older one sees that and leaves at
once, whatever it is waiting for: the lease on the run folder is free. Where it can't see it, its checkpoints
are still refused: publishing is fenced by the attempt (pretrain/checkpoint.py).

Starts are ordered by the run's own count of its submissions, then by SLURM's count of a job's restarts. Job
ids order nothing: those of another cluster are other numbers, and one cluster's begin again some day.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from data_pipeline.files import write_atomically
from launch.ranks.job import LOST_PEER
from launch.runs.files import read_json
from launch.runs.shapes import count

FILE = "incarnation.json"
POLL = 2.0
"""Seconds between looks: well below the time a new start needs to load its libraries."""


@dataclass(frozen=True)
class Incarnation:
    """One start of one job."""

    submission: int  # of this run, counted from 1; 0 where that isn't known
    restart: int
    job: str = ""  # SLURM's id
    cluster: str = ""  # SLURM's name of the cluster that gave the id

    @classmethod
    def mine(cls, submission: int) -> Self | None:
        """That of the calling process, None outside of SLURM."""
        if "SLURM_JOB_ID" not in os.environ:
            return None
        restart = count_of(os.environ.get("SLURM_RESTART_COUNT", ""))
        name = os.environ.get("SLURM_CLUSTER_NAME", "")
        return cls(submission, restart, os.environ["SLURM_JOB_ID"], name)

    @classmethod
    def newest(cls, root: Path) -> Self | None:
        """The newest that has started on the run in `root`."""
        found = read_json(root / FILE)
        if not found:
            return None
        # Before submissions were counted there were job and restart only: older than any that has a number.
        submission, restart = count(found.get("submission")) or 0, count(found.get("restart")) or 0
        return cls(submission, restart, str(found.get("job", "")), str(found.get("cluster", "")))

    def older_than(self, other: Incarnation) -> bool:
        """Whether `other` has taken over from this one.

        Two submissions with one number were made at the same moment: within one cluster, its ids tell.
        """
        if self.submission != other.submission:
            return self.submission < other.submission
        if (self.job, self.cluster) == (other.job, other.cluster):
            return self.restart < other.restart
        both = self.job.isdigit() and other.job.isdigit() and self.cluster == other.cluster
        return both and int(self.job) < int(other.job)

    def announce(self, root: Path) -> None:
        """By rank 0, first of all."""
        newest = Incarnation.newest(root)
        if newest is None or not self.older_than(newest):
            write_atomically(root / FILE, json.dumps(asdict(self)))

    def superseded(self, root: Path) -> bool:
        newest = Incarnation.newest(root)
        return newest is not None and self.older_than(newest)


def count_of(text: str) -> int:
    """A count in an environment variable, 0 where there is none."""
    return int(text) if text.isdigit() else 0


def leave_when_superseded(root: Path, mine: Incarnation) -> None:
    """Watch from a thread; main thread and collectives may hang meanwhile."""

    def watch() -> None:
        while not mine.superseded(root):
            time.sleep(POLL)
        os.write(2, b"a newer start of this run has taken over: leaving\n")
        os._exit(LOST_PEER)

    threading.Thread(target=watch, name="incarnation", daemon=True).start()
