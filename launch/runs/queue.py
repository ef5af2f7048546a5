"""What SLURM says of jobs, and what is asked of it: by its own commands, each with a time limit.

A listing must not hang on a controller that doesn't answer, nor fail where there is no SLURM or no
accounting: then less is known, and nothing is raised. Only `cancel` and `requeue` raise where they can't be
carried out.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from configs.errors import RunError

_ID = re.compile(r"\d+(_\d+)?")
_FIELDS = ("JobArrayID", "State", "Reason", "NodeList", "RestartCnt", "exit_code", "Name")
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_AT_WORK = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
)
_MAY_COME_BACK = frozenset({"NODE_FAIL", "PREEMPTED", "BOOT_FAIL"})
GONE = "GONE"
"""State of a job that the controller has forgotten and accounting, where there is any, doesn't know."""


@dataclass(frozen=True)
class JobState:
    """What is known of one job."""

    state: str  # SLURM's word: PENDING, RUNNING, COMPLETED, NODE_FAIL, ...; or GONE
    reason: str = ""  # why it waits or has failed, empty where SLURM gives none
    nodes: str = ""  # as SLURM writes it: node[1-2]
    restarts: int = 0  # times SLURM has run it again
    exit_code: int | None = None  # of the job's script, negative for a signal; None until it has ended
    name: str = ""  # the job's, empty where it isn't told
    # Told by the accounting, whose names aren't always those that were submitted.
    accounted: bool = field(default=False, compare=False)

    @property
    def waiting(self) -> bool:
        """Not running now, and going to."""
        return self.state in _WAITING

    @property
    def active(self) -> bool:
        """Waiting, running, or just ending: it must not be submitted once more."""
        return self.state in _WAITING or self.state in _AT_WORK


def states(job_ids: Iterable[str], timeout: float = 5.0) -> Mapping[str, JobState]:
    """Job id ("123", "123_4") to its state: by one squeue for all, then one sacct for those it doesn't know.

    A job of which nothing can be learnt, since there is no SLURM or it doesn't answer, is left out. Takes
    `timeout` seconds at most for each of the two.
    """
    wanted = {job for job in job_ids if _ID.fullmatch(job)}
    if not wanted:
        return {}
    said = _squeue(wanted, timeout)
    found = {job: state for job, state in (said or {}).items() if job in wanted}
    missing = wanted - found.keys()
    if missing:
        recorded = _sacct(missing, timeout)
        # For some seconds accounting calls a job ended that is being run again: only the controller knows.
        found |= {
            job: state
            for job, state in recorded.items()
            if job in missing and not (said is None and state.state in _MAY_COME_BACK)
        }
    if said is not None:  # the controller has answered, so what it doesn't know has ended
        found |= dict.fromkeys(wanted - found.keys(), JobState(GONE))
    return found


def known_as(job: JobState | None, name: str | None) -> JobState | None:
    """A job that was submitted as `name`; one with another name has got the id since, and ours is gone.

    Only the controller's names are compared: the accounting was seen to have others for the same job.
    """
    if job is None or job.accounted or not name or not job.name or job.name == name:
        return job
    return JobState(GONE)


@dataclass(frozen=True)
class Site:
    """What is known of the cluster whose commands these are."""

    cluster: str | None = None  # ClusterName
    max_array: int | None = None  # MaxArraySize: tasks that one array may have


def site(timeout: float = 5.0) -> Site:
    """By `scontrol show config`; nothing where it doesn't answer."""
    said = _ask(["scontrol", "show", "config"], timeout) or ""
    found = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", said, re.MULTILINE))
    most = found.get("MaxArraySize", "")
    return Site(found.get("ClusterName"), int(most) if most.isdigit() else None)


def cancel(job_ids: Sequence[str], *, to_save: bool = False, timeout: float = 30.0) -> None:
    """End jobs; those that have ended already are fine. Raises `RunError` where SLURM can't be told.

    `to_save`: a running job only gets SIGTERM and may take its time to save, where SLURM's own cancelling
    kills it after KillWait (30 s by default). It doesn't touch jobs that still wait.
    """
    if job_ids:
        asked = ["--signal=TERM"] if to_save else []
        _command(["scancel", *asked, *job_ids], timeout, fine=("already", "Invalid job id"))


def requeue(job_id: str, timeout: float = 30.0) -> None:
    """Have SLURM run a job again. Raises `RunError` where it refuses.

    From within the job, the requeue's own SIGTERM would kill the command that asks for it (3 times in 57):
    so that one ignores it.
    """
    ignoring = ["env", "--ignore-signal=TERM", "--ignore-signal=CONT"]
    _command([*ignoring, "scontrol", "requeue", job_id], timeout)


def would_accept(script: str, timeout: float = 20.0) -> tuple[bool | None, str]:
    """(whether SLURM would take this batch script, in its own words); None where it can't be asked."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            code, _, err = _run(["sbatch", "--test-only", file.name], timeout)
        except OSError:
            return None, "sbatch isn't here"
        except subprocess.TimeoutExpired:
            return None, f"SLURM didn't answer in {timeout:g} s"
    said = " ".join(err.split()) or "no word from sbatch"
    unasked = any(sign in said for sign in ("Unable to contact", "configuration source"))
    return (None if unasked else code == 0), said


def time_left(job_id: str, timeout: float = 5.0) -> float | None:
    """Seconds until a running job's time limit; None where there is no limit or nobody can tell."""
    said = _ask(["squeue", "--noheader", f"--jobs={job_id}", "--states=running", "-O", "TimeLeft:|"], timeout)
    return seconds_of((said or "").strip().rstrip("|"))


def seconds_of(text: str) -> float | None:
    """SLURM's "days-hours:minutes:seconds" in seconds, None where it is none (UNLIMITED, INVALID)."""
    parts = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if parts is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return float(((24 * days + hours) * 60 + minutes) * 60 + seconds)


def expanded(job_id: str) -> list[str]:
    """The members meant by an id as SLURM writes it: "12_[2-5,9%2]" is 12_2, ... 12_5, 12_9.

    Ranges may have a step: "12_[0-6:2]". An abbreviated list ("12_[1,...]") gives what is written out.
    """
    array = re.fullmatch(r"(\d+)_\[([^%\]]*)(?:%\d+)?\]", job_id)
    if array is None:
        return [job_id] if _ID.fullmatch(job_id) else []
    members: list[str] = []
    for part in array[2].split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if span:
            first, last, step = int(span[1]), int(span[2] or span[1]), int(span[3] or 1)
            members += [f"{array[1]}_{number}" for number in range(first, last + 1, step)]
    return members


def _squeue(wanted: Iterable[str], timeout: float) -> dict[str, JobState] | None:
    """What the controller knows; None where it doesn't answer."""
    formatted = ",".join(f"{name}:|" for name in _FIELDS)
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={_bases(wanted)}", "-O", formatted]
    said = _ask(command, timeout, fine="Invalid job id")
    return None if said is None else dict(_squeue_rows(said))


def _squeue_rows(said: str) -> Iterator[tuple[str, JobState]]:
    for line in said.splitlines():
        fields = [field.strip() for field in line.split("|", len(_FIELDS) - 1)]
        if len(fields) < len(_FIELDS):
            continue
        job, state, reason, nodes, restarts, status, name = fields
        ended = state not in _WAITING | _AT_WORK
        code = _wait_status(status) if ended else None
        again = int(restarts) if restarts.isdigit() else 0
        known = JobState(state, _said(reason), nodes, again, code, name.removesuffix("|"))
        for member in expanded(job):
            yield member, known


def _sacct(wanted: Iterable[str], timeout: float) -> dict[str, JobState]:
    fields = "JobID,State,Reason,NodeList,ExitCode,JobName"
    command = ["sacct", "-X", "--noheader", "--parsable2", f"--format={fields}", f"--jobs={_bases(wanted)}"]
    found: dict[str, JobState] = {}
    for line in (_ask(command, timeout) or "").splitlines():
        if line.count("|") < fields.count(","):
            continue
        job, state, reason, nodes, code, name = line.split("|", fields.count(","))
        state, _, by = state.partition(" ")  # "CANCELLED by 1000"
        ended = state not in _WAITING | _AT_WORK
        ended_by = _exit_code(code) if ended else None
        known = JobState(state, by or _said(reason), _said(nodes), 0, ended_by, name, accounted=True)
        found |= dict.fromkeys(expanded(job), known)
    return found


def _bases(wanted: Iterable[str]) -> str:
    """Whole arrays: both commands are quicker at one id than at its hundred members."""
    return ",".join(sorted({job.partition("_")[0] for job in wanted}, key=int))


def _said(text: str) -> str:
    return "" if text in ("None", "None assigned", "(null)", "N/A") else text


def _wait_status(text: str) -> int | None:
    """squeue's exit_code, which is a wait status."""
    try:
        return os.waitstatus_to_exitcode(int(text))
    except (ValueError, OverflowError):
        return None


def _exit_code(text: str) -> int | None:
    """sacct's "code:signal"."""
    parts = re.fullmatch(r"(\d+):(\d+)", text)
    if parts is None:
        return None
    return -int(parts[2]) if int(parts[2]) else int(parts[1])


def _ask(command: Sequence[str], timeout: float, fine: str | None = None) -> str | None:
    """Standard output; None where the command isn't there, fails or takes too long.

    A failure that says `fine` on standard error is an answer too.
    """
    try:
        code, out, err = _run(command, timeout)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out if code == 0 or (fine is not None and fine in err) else None


def _command(command: Sequence[str], timeout: float, fine: Sequence[str] = ()) -> None:
    """Raises `RunError` where it fails, unless each line it says has one of the `fine` words in it."""
    name = next(part for part in command if part.startswith("sc"))
    try:
        code, _, err = _run(command, timeout)
    except OSError:
        raise RunError(f"{name}: isn't here; call it where SLURM's commands are") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{name}: SLURM didn't answer in {timeout:g} s; try again later") from None
    lines = [line for line in err.splitlines() if line.strip()]
    if code and not (lines and all(any(word in line for word in fine) for line in lines)):
        words = " ".join(err.split()) or f"exit code {code}"
        raise RunError(f"{name}: SLURM refused: {words}")


def _run(command: Sequence[str], timeout: float) -> tuple[int, str, str]:
    """(exit code, output, errors). Ends whatever the command started: sites wrap these in scripts."""
    # The user's own formats and filters would change what is printed.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    process = subprocess.Popen(
        command,
        env=environment | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, out, err
