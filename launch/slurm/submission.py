"""RUN/slurm.json: which job a run was submitted as."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from configs.errors import RunError
from data_pipeline.files import write_atomically
from launch.runs.places import writing
from launch.runs.shapes import submission
from pretrain.run.folder import now

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
    site: str | None = None  # SLURM's name of the cluster that gave the id: another has the same ids
    name: str | None = None  # the job's: ids are given away again some day

    def is_of(self, cluster: str | None) -> bool:
        """Whether `cluster`, as SLURM calls itself, can be asked about the job; True where it isn't known."""
        return not self.site or not cluster or self.site == cluster

    @classmethod
    def of(cls, root: Path) -> Self | None:
        """That of the run in `root`, None where it was never submitted. Raises `RunError` where torn."""
        file = root / FILE
        try:
            found = json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{file}: can't be read ({error}); restore it, or remove it") from error
        names = {each.name for each in fields(cls)}
        kept, wrong = submission(found) if isinstance(found, dict) else ({}, ["holds no JSON object"])
        missing = {"job_id", "cluster"} - kept.keys()
        if wrong or missing:
            what = wrong[0] if wrong else f"it has no {min(missing)}"
            raise RunError(f"{file}: can't be used ({what}); restore it, or remove it")
        empty = {"submitted": "", "log_folder": "", "code": ""}
        return cls(**(empty | {name: value for name, value in kept.items() if name in names}))

    def write(self, root: Path) -> None:
        with writing(root / FILE):
            write_atomically(root / FILE, json.dumps(asdict(self), indent=1))

    def cancel(self, root: Path) -> None:
        """Mark it, before the job is told: a job that sees the mark doesn't come back."""
        replace(self, cancelled=now()).write(root)
