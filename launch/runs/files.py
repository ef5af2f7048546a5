"""What the files of a run say: small reads, mostly of ends, that never raise for what is missing or torn."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json  # several times as quick as the standard library's

from launch.runs import shapes
from launch.runs.shapes import Row

_TAIL = 16_384
_ERROR = re.compile(r"error: |[\w.]*(?:Error|Exception|Interrupt)\b|.*\b(?:Killed|Segmentation fault|oom)\b")
_ECHO = re.compile(r"Connection (?:closed|reset) by peer|gloo.*Broken pipe|ncclRemoteError", re.DOTALL)


@dataclass(frozen=True)
class Facts:
    """What the files of a run say, as far as they have the shapes they should have."""

    path: Path
    name: str
    run: Row  # run.json
    job: Row  # slurm.json
    objective: str
    rows: Sequence[Row]  # the last few of metrics.jsonl
    evaluations: Sequence[Row]
    held: bool | None  # whether a process of this machine holds its lease; None where that can't be told
    broken: str = ""  # what can't be read, and which file that is in; empty where all is well
    unknown: bool = False  # whether that leaves open how the run stands

    @property
    def slurm_job(self) -> str | None:
        """SLURM's id; a local executor's is a process id, which SLURM must not be asked about."""
        if self.job.get("cluster", {"executor": "unknown"}).get("executor", "slurm") != "slurm":
            return None
        return self.job.get("job_id")


def run_folders(root: Path) -> Iterator[Path]:
    """Folders at or below `root` that are runs; what lies within a run isn't looked at."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                names = {entry.name: entry for entry in entries}
        except OSError:
            continue
        if "config.yaml" in names and ("run.json" in names or "checkpoints" in names):
            yield folder
            continue
        waiting += [
            Path(entry.path)
            for name, entry in names.items()
            if not name.startswith(".") and name != "submissions" and entry.is_dir(follow_symlinks=False)
        ]


def read(path: Path, root: Path) -> Facts:
    """Everything that is read of a run; what is missing, torn or of another shape counts for nothing."""
    found, torn = _object(path / "run.json")
    run, wrong = shapes.run_state(found)
    run = {key: value for key, value in run.items() if value is not None}
    submitted, unsubmitted = _object(path / "slurm.json")
    job, odd = shapes.submission(submitted)
    rows, odd_rows = shapes.metrics(_parsed(path / "metrics.jsonl", last=5))
    judged, odd_evaluations = evaluations(path, 1 << 20)
    unknown = bool(torn) or ("status" in found and "status" not in run)
    if not found and not torn and rows:
        unknown, torn = True, "run.json: is gone, and the run has trained"
    problems = [torn, *wrong, unsubmitted, *odd, *odd_rows, *odd_evaluations]
    return Facts(
        path=path,
        name=str(path.relative_to(root)) if path != root else path.name,
        run=run,
        job=job,
        objective=_objective(path / "config.yaml"),
        rows=rows,
        evaluations=judged,
        held=None if run.get("status") == "done" else lease_held(path),
        broken=next((problem for problem in problems if problem), ""),
        unknown=unknown,
    )


def evaluations(path: Path, size: int = 1 << 24) -> tuple[list[Row], list[str]]:
    """(rows of the run's evaluations.jsonl that can be used, what is wrong with the others)."""
    return shapes.evaluations(_parsed(path / "evaluations.jsonl", size))


def _object(path: Path) -> tuple[Row, str]:
    """(a JSON object, why there is none although the file is there)."""
    data, _ = _end(path, 1 << 24)
    try:
        if not data and not path.exists():
            return {}, ""
        if not data and not os.access(path, os.R_OK):
            return {}, f"{path.name}: can't be read; look at its owner"
        found = from_json(data)
    except OSError as error:
        return {}, f"{path.name}: can't be read: {error.strerror}"
    except ValueError:
        return {}, f"{path.name}: is torn, or no JSON"
    return (found, "") if isinstance(found, dict) else ({}, f"{path.name}: holds no JSON object")


def tail(path: Path, size: int = _TAIL, last: int | None = None) -> list[Row]:
    """The whole rows within the last `size` bytes of a JSON-lines file, the `last` few of them."""
    rows: list[Row] = [row for row in _parsed(path, size, last) if isinstance(row, dict)]
    return rows


def _parsed(path: Path, size: int = _TAIL, last: int | None = None) -> list[Any]:
    """As `tail`, with whatever JSON the lines hold."""
    data, cut = _end(path, size)
    lines = [line for line in data.split(b"\n")[1 if cut else 0 :] if line]
    lines = lines[-last - 1 :] if last else lines  # one more, should a kill have cut the last
    found: list[Any]
    try:
        found = from_json(b"[" + b",".join(lines) + b"]")
    except ValueError:
        found = [row for line in lines for row in _rows(line)]
    return found[-last if last else 0 :]


def _rows(line: bytes) -> list[Any]:
    try:
        return [from_json(line)]
    except ValueError:
        return []


def lease_held(path: Path) -> bool | None:
    """Whether a process of this machine trains the run now; None where the last was of another machine."""
    if holder(path) is None:
        return None
    try:
        with (path / ".lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return None


def has_open(process: int, path: Path) -> bool:
    """Whether a process of this machine has a file open: its number alone doesn't make it the one meant."""
    try:
        wanted = path.stat()
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                found = descriptor.stat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
    except OSError:
        return False
    return False


def holder(path: Path) -> int | None:
    """Process id of the last that held the run's lease, if that was on this machine."""
    said = re.fullmatch(rb"process (\d+) on (\S+)\s*", _end(path / ".lock", 200)[0])
    return int(said[1]) if said and said[2].decode() == platform.node() else None


def last_words(facts: Facts) -> str:
    """The line that tells most of how a run ended: the last error in its ranks' logs or its job's output."""
    logs = sorted((facts.path / "logs").glob("rank-*.log"))[:64]
    if facts.job.get("log_folder") and facts.job.get("job_id"):
        logs += sorted(Path(facts.job["log_folder"]).glob(f"{facts.job['job_id']}_*_log.err"))[:64]
    spoken = [_last_line(_end(log, _TAIL)[0].decode(errors="replace")) for log in logs]
    errors = [line for line, error in spoken if error]
    return next(iter(errors or [line for line, _ in spoken if line]), "")


def stayed(facts: Facts) -> str:
    """Why the run's job wasn't run again although the run was to go on; empty where nothing is said of it."""
    if not (facts.job.get("log_folder") and facts.slurm_job):
        return ""
    said = _end(Path(facts.job["log_folder"]) / f"{facts.slurm_job}.stays", 1000)[0]
    return " ".join(said.decode(errors="replace").split())


def _last_line(text: str) -> tuple[str, bool]:
    """(the last line, or the last that is an error and no echo of another rank's; whether it is one)."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("--- ")]
    errors = [line for line in lines if _ERROR.match(line) and not is_echo(line)]
    return (errors or lines or [""])[-1][:300], bool(errors)


def _end(path: Path, size: int) -> tuple[bytes, bool]:
    """(the last `size` bytes of a file, whether there are more before them); nothing where there is none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b"", False
    try:
        start = max(0, os.fstat(file).st_size - size)
        return os.pread(file, size, start), start > 0
    except OSError:
        return b"", False
    finally:
        os.close(file)


def is_echo(text: str) -> bool:
    """Whether an error only tells that another rank is gone: gloo's words for it, or NCCL's."""
    return _ECHO.search(text) is not None


def read_json(path: Path) -> Row:
    """A JSON object; empty where there is none or it is torn."""
    return _object(path)[0]


def _objective(config: Path) -> str:
    """`objective.name`, by its place in the dumped text: a YAML parser takes a thousand times as long."""
    named = re.search(r"^  name: (\S+)$", objective_text(config), re.MULTILINE)
    return named[1].strip("'\"") if named else ""


def objective_text(config: Path) -> str:
    """The section `objective` of a dumped config, as text; empty where there is none."""
    text = _end(config, 1 << 16)[0].decode(errors="replace")
    section = re.search(r"^objective:\n(?:  .*\n)*", text, re.MULTILINE)
    return section[0] if section else ""
