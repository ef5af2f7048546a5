"""Which start of which job a run belongs to: RUN/incarnation.json.

After a network cut SLURM runs a job again while the old start may still be alive on the other side, for a
minute and more. The newer start writes its number down; every rank of an older one sees that and leaves at
once, whatever it is waiting for: the lease on the run folder is free. Where it can't see it, its checkpoints
are still refused: publishing is fenced by the attempt (pretrain/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from launch.job import LOST_PEER
from pretrain.folder import write_atomically

FILE = "incarnation.json"
POLL = 2.0
"""Seconds between looks: well below the time a new start needs to load its libraries."""


@dataclass(frozen=True, order=True)
class Incarnation:
    """Ordered by age: SLURM gives out job ids in order, and counts the restarts of each."""

    job: int
    restart: int

    @classmethod
    def mine(cls) -> Self | None:
        """That of the calling process, None outside of SLURM."""
        if "SLURM_JOB_ID" not in os.environ:
            return None
        return cls(int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    @classmethod
    def newest(cls, root: Path) -> Self | None:
        """The newest that has started on the run in `root`."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads((root / FILE).read_text()))
        return None

    def announce(self, root: Path) -> None:
        """By rank 0, first of all."""
        newest = Incarnation.newest(root)
        if newest is None or newest < self:
            write_atomically(root / FILE, json.dumps({"job": self.job, "restart": self.restart}))

    def superseded(self, root: Path) -> bool:
        newest = Incarnation.newest(root)
        return newest is not None and self < newest


def leave_when_superseded(root: Path, mine: Incarnation) -> None:
    """Watch from a thread; main thread and collectives may hang meanwhile."""

    def watch() -> None:
        while not mine.superseded(root):
            time.sleep(POLL)
        os.write(2, b"a newer start of this job has taken over: leaving\n")
        os._exit(LOST_PEER)

    threading.Thread(target=watch, name="incarnation", daemon=True).start()
