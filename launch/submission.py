"""RUN/slurm.json: which job a run was submitted as."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from pretrain.folder import now, write_atomically

FILE = "slurm.json"


@dataclass(frozen=True)
class Submission:
    """The newest submission of a run. Written by whoever submits or cancels, never by the job."""

    job_id: str  # "12", or "12_3" for a member of an array
    cluster: Mapping[str, Any]  # resolved
    submitted: str  # ISO 8601
    log_folder: str  # submitit's files
    code: str  # snapshot that the job runs
    history: Sequence[str] = ()  # ids of older jobs
    cancelled: str | None = None  # when the user asked that it stay away

    @classmethod
    def of(cls, root: Path) -> Self | None:
        """That of the run in `root`, None where it was never submitted."""
        try:
            return cls(**json.loads((root / FILE).read_text()))
        except FileNotFoundError:
            return None

    def write(self, root: Path) -> None:
        write_atomically(root / FILE, json.dumps(asdict(self), indent=1))

    def cancel(self, root: Path) -> None:
        """Mark it, before the job is told: a job that sees the mark doesn't come back."""
        replace(self, cancelled=now()).write(root)
