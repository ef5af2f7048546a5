"""The adapter to submitit: jobs out, and a task's place in its job.

What submitit would do on a signal isn't used: it calls one rank's `checkpoint()` inside of a signal handler,
where a collective save deadlocks, and its requeue can be killed by the requeue's own SIGTERM, which then
stands in its files as the job's result. Ours: every rank sets a flag (launch/ranks/job.py), all save together
and leave with REQUEUE, and the batch script, which outlives them, asks SLURM to run the job again.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from configs.errors import RunError
from launch.slurm.cluster import ClusterConfig

REQUEUE: int = LOCAL_REQUEUE_RETURN_CODE
"""A task's exit code that asks to be run again. That of submitit's local executor, which obeys it."""

EXCLUDED = "excluded"
"""Ending of the file beside submitit's, named by job id, with nodes that the requeued job is to avoid."""

FAILED = "failed"
"""Ending of the file that says that a rank of the job has failed by itself, and wasn't only torn down."""

STAYS = "stays"
"""Ending of the file that says why a job wasn't run again although its run was to go on."""

KILLS = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGKILL, signal.SIGSEGV)
"""How a rank dies that nobody has asked to leave: NCCL's watchdog aborts, the kernel kills for memory."""

SOON, QUICK_KILLS = 600, 3
"""So many kills in a row, each within so many seconds of the job's start, are answered by a requeue."""

Task = Callable[[], Any]


@dataclass(frozen=True)
class Place:
    """Where a task stands in its job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    hosts: Sequence[str]
    job: str  # id, "12_3" for a member of an array
    folder: Path  # of submitit's files

    def mark(self, ending: str, text: str) -> None:
        """Leave a word about this job beside submitit's files; where nothing can be written, none is left."""
        with contextlib.suppress(OSError):
            (self.folder / f"{self.job}.{ending}").write_text(text + "\n")

    def environment(self) -> Mapping[str, str]:
        """What torch.distributed, DeepSpeed and accelerate read."""
        raw = os.environ.get("SLURM_JOB_ID", self.job)
        number = int(raw) if raw.isdigit() else os.getpid()
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank), "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.hosts[0] if self.world_size > self.local_world_size else "127.0.0.1",
            # Below the ports that the kernel gives out itself, and apart for jobs that share a node.
            "MASTER_PORT": str(12_000 + (number + 61 * restarts) % 18_000),
        }  # fmt: skip


def place() -> Place:
    """Of the calling task, from what SLURM or submitit's local executor has put into the environment."""
    here = submitit.JobEnvironment()
    return Place(
        rank=here.global_rank,
        world_size=here.num_tasks,
        local_rank=here.local_rank,
        local_world_size=here.num_tasks // here.num_nodes,
        node=here.node,
        hosts=list(here.hostnames),
        job=here.job_id,
        folder=Path(os.environ.get("SUBMITIT_FOLDER", ".")),
    )


def submit(
    tasks: Sequence[Task],
    cluster: ClusterConfig,
    *,
    folder: Path,
    code: Path,
    name: str,
    after: str | None = None,
) -> list[str]:
    """Submit `tasks` as one job each, several as one array; gives the job ids.

    `folder`: of submitit's files; `code`: what the jobs import keel from; `after`: id of a job, or of an
    array, that has to end first. Raises `RunError` with sbatch's own words where it refuses.
    """
    if cluster.executor == "slurm" and not shutil.which("sbatch"):
        raise RunError(
            "executor: slurm needs sbatch, which isn't here; submit from a login node, or look at --dry-run"
        )
    executor = _executor(cluster, folder, code, name, after)
    try:
        with _outside_of_any_job():
            jobs = [executor.submit(tasks[0])] if len(tasks) == 1 else executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        said = " ".join(str(error).split()) or "no reason given"
        raise RunError(f"sbatch refused the job: {said}") from error
    if cluster.executor == "debug":
        for job in jobs:
            job.result()
    return [str(job.job_id) for job in jobs]


def script(
    cluster: ClusterConfig,
    *,
    folder: Path,
    code: Path,
    name: str,
    count: int = 1,
    after: str | None = None,
) -> str:
    """The sbatch script as it would be submitted. Needs no SLURM."""
    executor = _executor(cluster, folder, code, name, after)
    if not isinstance(executor, _SlurmExecutor):
        command = executor._submitit_command_str if cluster.executor == "local" else "this process"
        return f"# executor {cluster.executor}, no script; it runs:\n{command}\n"
    if count > 1:
        executor.parameters["map_count"] = count
    return str(executor._make_submission_file_text(executor._submitit_command_str, uid="dry-run"))


class _SlurmExecutor(submitit.SlurmExecutor):  # type: ignore[misc]  # submitit is untyped here
    """Can be made without SLURM, so that a script can be shown."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(cluster: ClusterConfig, folder: Path, code: Path, name: str, after: str | None = None) -> Any:
    setup = _setup(cluster, code)
    if cluster.executor == "debug":
        return submitit.DebugExecutor(folder=folder)
    if cluster.executor == "local":
        executor = submitit.LocalExecutor(folder=folder, python=_python(cluster))
        executor.update_parameters(
            tasks_per_node=cluster.tasks_per_node, gpus_per_node=cluster.gpus_per_node,
            timeout_min=cluster.minutes, signal_delay_s=cluster.signal_delay, setup=setup, name=name,
        )  # fmt: skip
        return executor
    executor = _SlurmExecutor(folder=folder, python=_python(cluster))
    asked = {
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos,
        "constraint": cluster.constraint, "exclude": cluster.exclude, "exclusive": cluster.exclusive or None,
        "mem": None if cluster.memory_gb is None else f"{round(1024 * cluster.memory_gb)}M",
        "gpus_per_node": cluster.gpus if cluster.gpus_by == "gpus-per-node" and cluster.gpus else None,
        "gres": f"gpu:{cluster.gpus}" if cluster.gpus_by == "gres" and cluster.gpus else None,
    }  # fmt: skip
    # A flag that is off isn't given: sbatch refuses --contiguous=False.
    extra = {name: value for name, value in cluster.extra.items() if value is not False}
    dependency = str(extra.pop("dependency", ""))
    if after is not None:
        dependency = ",".join(filter(None, [dependency, f"afterany:{after}"]))
    if dependency:
        extra["dependency"] = dependency
    executor.update_parameters(
        job_name=name,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.tasks_per_node,
        cpus_per_task=cluster.cpus_per_task,
        time=cluster.minutes,
        signal_delay_s=cluster.signal_delay,
        array_parallelism=cluster.parallel,
        setup=[*setup, *_forget(folder)],
        teardown=_teardown(cluster, folder),
        # One rank's failure ends the job at once, instead of leaving the others in a collective call.
        srun_args=["--kill-on-bad-exit=1"],
        # SLURM runs it again after a node's failure or a preemption.
        additional_parameters={"requeue" if cluster.requeue else "no-requeue": True, **extra},
        **{key: value for key, value in asked.items() if value is not None},
    )
    return executor


def _python(cluster: ClusterConfig) -> str:
    python = shlex.quote(cluster.python or sys.executable)
    return f"{cluster.container} {python}" if cluster.container else python


def _setup(cluster: ClusterConfig, code: Path) -> list[str]:
    """Shell lines before the ranks: the site's, then where keel is imported from."""
    exports = {**cluster.environment, "PYTHONSAFEPATH": "1"}  # the folder submitted from must not be imported
    return [
        *cluster.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def _forget(folder: Path) -> list[str]:
    """Shell lines before the ranks: where marks of this job lie, and those of an earlier start taken away."""
    return [
        f"keel_job={shlex.quote(str(folder))}/"
        "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f'rm -f "$keel_job.{FAILED}" "$keel_job.{STAYS}"',
    ]


def _teardown(cluster: ClusterConfig, folder: Path) -> list[str]:
    """Shell lines after the ranks: the requeue they asked for, or that a killed one would have asked for.

    A rank that NCCL aborts, or that is killed for memory, can ask for nothing: like the launcher of one
    machine, the script then runs all of them again, unless a rank has said that it failed by itself. The
    requeue's own SIGTERM must not stop it half-way. Where it stays away after all, `keel runs` can say why.
    """
    where = f"{shlex.quote(str(folder))}/$SLURM_JOB_ID.{EXCLUDED}"
    kills = "|".join(str(128 + number) for number in KILLS)
    return [
        "code=$?",
        "trap '' TERM CONT",
        f'stays() {{ echo "$1" >&2; echo "$1" > "$keel_job.{STAYS}"; }}',
        "again() {",
        '    said=$(env --ignore-signal=TERM --ignore-signal=CONT scontrol "$@" 2>&1) || stays "$said"',
        "}",
        "back=",
        'case "$code" in',
        f'{REQUEUE}) back=yes; rm -f "$keel_job.killed" ;;',
        f'{kills}) if [ ! -e "$keel_job.{FAILED}" ]; then',
        '    kills=$(cat "$keel_job.killed" 2>/dev/null)',
        f'    if [ "$SECONDS" -ge {SOON} ]; then kills=0; fi',
        "    kills=$((${kills:-0} + 1))",
        '    echo "$kills" > "$keel_job.killed"',
        f'    if [ "$kills" -le {QUICK_KILLS} ]; then back=yes',
        f'    else stays "killed (exit code $code) $kills times within {SOON // 60} min of its start"; fi',
        "fi ;;",
        "esac",
        'if [ -z "$back" ]; then :',
        *([] if cluster.requeue else ['else stays "the cluster\'s file has requeue: false"; fi']),
        *(_requeue(cluster, where) if cluster.requeue else []),
        'exit "$code"',
    ]


def _requeue(cluster: ClusterConfig, where: str) -> list[str]:
    return [
        f'elif [ "${{SLURM_RESTART_COUNT:-0}}" -ge {cluster.max_restarts} ]; then',
        f'    stays "max_restarts, {cluster.max_restarts}, is used up"',
        f"elif bad=$(cat {where} 2>/dev/null); then",
        '    again requeuehold "$SLURM_JOB_ID"',
        '    again update JobId="$SLURM_JOB_ID" ExcNodeList="$bad"',
        '    again release "$SLURM_JOB_ID"',
        "else",
        '    again requeue "$SLURM_JOB_ID"',
        "fi",
    ]


@contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """A job submitted from within a job must not inherit its size; where SLURM is configured, it must."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield
