"""The adapter to submitit: jobs out, and a task's place in its job.

What submitit would do on a signal isn't used: it calls one rank's `checkpoint()` inside of a signal handler,
where a collective save deadlocks, and its requeue can be killed by the requeue's own SIGTERM, which then
stands in its files as the job's result. Ours: every rank sets a flag (launch/job.py), all save together and
leave with REQUEUE, and the batch script, which outlives them, asks SLURM to run the job again.
"""

from __future__ import annotations

import os
import shlex
import shutil
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
from launch.cluster import ClusterConfig

REQUEUE: int = LOCAL_REQUEUE_RETURN_CODE
"""A task's exit code that asks to be run again. That of submitit's local executor, which obeys it."""

EXCLUDED = "excluded"
"""Ending of the file beside submitit's, named by job id, with nodes that the requeued job is to avoid."""

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
    tasks: Sequence[Task], cluster: ClusterConfig, *, folder: Path, code: Path, name: str
) -> list[str]:
    """Submit `tasks` as one job each, several as one array; gives the job ids.

    `folder`: of submitit's files; `code`: what the jobs import keel from. Raises `RunError` with sbatch's own
    words where it refuses.
    """
    if cluster.executor == "slurm" and not shutil.which("sbatch"):
        raise RunError(
            "executor: slurm needs sbatch, which isn't here; submit from a login node, or look at --dry-run"
        )
    executor = _executor(cluster, folder, code, name)
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


def script(cluster: ClusterConfig, *, folder: Path, code: Path, name: str, count: int = 1) -> str:
    """The sbatch script as it would be submitted. Needs no SLURM."""
    executor = _executor(cluster, folder, code, name)
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


def _executor(cluster: ClusterConfig, folder: Path, code: Path, name: str) -> Any:
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
        "gpus_per_node": cluster.gpus_per_node or None,
    }  # fmt: skip
    executor.update_parameters(
        job_name=name,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.tasks_per_node,
        cpus_per_task=cluster.cpus_per_task,
        time=cluster.minutes,
        signal_delay_s=cluster.signal_delay,
        array_parallelism=cluster.parallel,
        setup=setup,
        teardown=_teardown(cluster, folder),
        # One rank's failure ends the job at once, instead of leaving the others in a collective call.
        srun_args=["--kill-on-bad-exit=1"],
        # SLURM runs it again after a node's failure or a preemption.
        additional_parameters={"requeue": True, **cluster.extra},
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


def _teardown(cluster: ClusterConfig, folder: Path) -> list[str]:
    """Shell lines after the ranks: the requeue they asked for. Its own SIGTERM must not stop it half-way."""
    where = f"{shlex.quote(str(folder))}/$SLURM_JOB_ID.{EXCLUDED}"
    return [
        "code=$?",
        "trap '' TERM CONT",
        'again() { env --ignore-signal=TERM --ignore-signal=CONT scontrol "$@"; }',
        f'if [ "$code" -eq {REQUEUE} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {cluster.max_restarts} ]; then',
        f"    if bad=$(cat {where} 2>/dev/null); then",
        '        again requeuehold "$SLURM_JOB_ID"',
        '        again update JobId="$SLURM_JOB_ID" ExcNodeList="$bad"',
        '        again release "$SLURM_JOB_ID"',
        "    else",
        '        again requeue "$SLURM_JOB_ID"',
        "    fi",
        "fi",
        'exit "$code"',
    ]


@contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """A job submitted from within a job must not inherit its size; where SLURM is configured, it must."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield
