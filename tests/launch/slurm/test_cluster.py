"""Cluster files: what can't be is refused in a line; a script holds what the file asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.registry import make_run, state
from configs.errors import ConfigError, RunError
from launch.runs import queue
from launch.runs.registry import look
from launch.slurm import executor
from launch.slurm.cluster import load_cluster, parted


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["gpus_per_node=4", "tasks_per_node=2"], "each rank has one GPU"),
        (["minutes=1"], "signal_delay: found 120 s"),
        (["executor=local", "nodes=2"], "executor local has this machine only"),
        (["executor=debug", "tasks_per_node=2"], "executor debug runs one task"),
        (["node=3"], "did you mean nodes"),
        # what the run lives by, and what has a setting
        (["extra={signal: USR1@60}"], "signal: found 'USR1@60'; can't be set: the run is told by it to save"),
        (["extra={array: 0-1}"], "array: found '0-1'; can't be set: one task is one run"),
        (["extra={--array: 0-1}"], "can't be set: one task is one run"),
        (["extra={requeue: false}"], "requeue: found False; has a setting of its own here: requeue"),
        (["extra={no_requeue: true}"], "has a setting of its own here: requeue: false"),
        (["extra={job_name: x}"], "can't be set: keel knows its jobs again by it"),
        (["extra={output: x}"], "can't be set: keel logs and keel runs look where"),
        (["extra={mem: 3G}"], "has a setting of its own here: memory_gb"),
        (["extra={gres: 'gpu:2'}"], "GPUs are asked for by gpus_per_node, gpus_by: gres and gpu_type"),
        (["extra={gpus-per-task: 1}"], "GPUs are asked for by gpus_per_node"),
        (["extra={'a b': 1}"], "an option of sbatch, its value in one line"),
        (['extra={comment: "a\\nb"}'], "an option of sbatch, its value in one line"),
    ],
)
def test_the_impossible_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_cluster("clusters/slurm", settings)


@pytest.mark.parametrize(
    ("settings", "there", "absent"),
    [
        ([], ["--gpus-per-node=2", "--requeue"], "--gres"),
        (["gpus_by=gres"], ["--gres=gpu:2"], "--gpus-per-node"),
        (["gpus_by=gres", "gpu_type=a100"], ["--gres=gpu:a100:2"], "--gpus-per-node"),
        (["gpu_type=a100"], ["--gpus-per-node=a100:2"], "--gres"),
        (["requeue=false"], ["--no-requeue"], "--requeue"),
        (["extra={gres: 'scratch:1', contiguous: true, spread-job: false}"],
         ["--gres=scratch:1", "--contiguous"], "spread-job"),
    ],
)  # fmt: skip
def test_options_as_a_site_has_them(
    tmp_path: Path, settings: list[str], there: list[str], absent: str
) -> None:
    cluster = load_cluster("clusters/slurm", ["tasks_per_node=2", "gpus_per_node=2", *settings])
    assert cluster.gpu is True  # keel knows of them, however they are asked for
    script = executor.script(cluster, folder=tmp_path, code=tmp_path, name="n")
    for line in there:
        assert f"#SBATCH {line}\n" in script
    assert f"#SBATCH {absent}" not in script and f"--{absent}" not in script


def test_one_array_waits_for_another_and_for_what_its_user_says(tmp_path: Path) -> None:
    cluster = load_cluster("clusters/slurm", ["extra={dependency: 'singleton'}"])
    script = executor.script(cluster, folder=tmp_path, code=tmp_path, name="n", count=2, after="12")
    assert "#SBATCH --dependency=singleton,afterany:12\n" in script


def test_everything_in_the_file_is_in_the_script(tmp_path: Path) -> None:
    cluster = load_cluster(
        "clusters/slurm",
        [
            "nodes=3", "tasks_per_node=8", "gpus_per_node=8", "cpus_per_task=12", "memory_gb=1.5",
            "minutes=90", "partition=p", "account=a", "qos=q", "constraint=c", "exclude=n9", "exclusive=true",
            "parallel=4",
            "signal_delay=200", "extra={mail-type: END}", "setup=[module load cuda]",
            "environment={NCCL_SOCKET_IFNAME: 'ib 0'}", "container=apptainer exec x.sif",
            "python=/opt/python", "max_restarts=7",
        ],
    )  # fmt: skip
    script = executor.script(cluster, folder=tmp_path / "a b", code=tmp_path / "code", name="n", count=9)
    for line in (
        "--nodes=3", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=1536M",
        "--time=90", "--partition=p", "--account=a", "--qos=q", "--constraint=c", "--exclude=n9",
        "--exclusive", "--array=0-8%4", "--signal=USR2@200", "--mail-type=END", "--requeue", "--job-name=n",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load cuda\n" in script
    assert "export NCCL_SOCKET_IFNAME='ib 0'\n" in script
    assert " apptainer exec x.sif /opt/python -u -m submitit.core._submit " in script
    assert "-ge 7 ]" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="needs sbatch"):
        executor.submit([print], load_cluster("clusters/slurm"), folder=tmp_path, code=tmp_path, name="n")


def test_ports_of_neighbouring_jobs_and_restarts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    place = executor.Place(1, 4, 1, 2, 0, ("node1", "node2"), "7", Path())
    ports = set()
    for job in range(100, 140):
        for restart in range(3):
            monkeypatch.setenv("SLURM_JOB_ID", str(job))
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            ports.add(int(place.environment()["MASTER_PORT"]))
    assert len(ports) == 120 and all(12_000 <= port < 30_000 for port in ports)
    assert place.environment()["MASTER_ADDR"] == "node1"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a command of SLURM's that does what `body` says in front of all others; gives what it prints to."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin")

    def put(name: str, body: str) -> Path:
        said = tmp_path / f"{name}.said"
        (programs / name).write_text(f"#!/bin/bash\nexec 3>>{said}\n{body}\n")
        (programs / name).chmod(0o755)
        return said

    return put


def ran(tmp_path: Path, code: int, restarts: int = 0, *, array: bool = False, **settings: object) -> int:
    """Run the batch script of job 7 with ranks that end with `code`; gives the script's exit code."""
    given = [f"{name}={value}" for name, value in settings.items()]
    cluster = load_cluster("clusters/slurm", ["minutes=10", *given])
    script = executor.script(cluster, folder=tmp_path / "it's", code=tmp_path / "code", name="n")
    (tmp_path / "it's").mkdir(exist_ok=True)
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    if array:
        environment |= {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\n{tmp_path}/ranks\nexit {code}\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    return subprocess.run(["bash"], input=script, text=True, env=environment, check=False).returncode


ABORTED, KILLED, TERMINATED = 128 + 6, 128 + 9, 128 + 15


def test_a_killed_rank_is_run_again_as_on_one_machine(
    tmp_path: Path, site: Callable[[str, str], Path]
) -> None:
    """As NCCL's watchdog aborts it when a peer is gone, or the kernel kills it for memory."""
    said = site("scontrol", 'echo "$*" >&3')
    ranks = tmp_path / "ranks"
    ranks.write_text("#!/bin/bash\n")
    ranks.chmod(0o755)
    for number in (ABORTED, KILLED, ABORTED):
        assert ran(tmp_path, number) == number
    assert said.read_text().splitlines() == ["requeue 7"] * 3
    # Whoever dies again and again at once is a failure; a stop in between, on purpose, starts a new count.
    assert ran(tmp_path, KILLED) == KILLED and len(said.read_text().splitlines()) == 3
    stays = tmp_path / "it's" / "7.stays"
    assert stays.read_text() == "killed (exit code 137) 4 times within 10 min of its start\n"
    assert ran(tmp_path, executor.REQUEUE) == executor.REQUEUE and not stays.exists()
    assert ran(tmp_path, ABORTED) == ABORTED
    assert len(said.read_text().splitlines()) == 5
    # One that was asked to go, or that failed by itself and took the others with it, stays away.
    assert ran(tmp_path, TERMINATED) == TERMINATED
    ranks.write_text('#!/bin/bash\ntouch "$(dirname "$0")/it\'s/7.failed"\n')
    assert ran(tmp_path, KILLED) == KILLED
    assert len(said.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("answer", "restarts", "settings", "said"),
    [
        ("echo 'Access/permission denied' >&2; exit 1", 0, {}, "Access/permission denied"),
        ("exit 0", 5, {"max_restarts": 5}, "max_restarts, 5, is used up"),
        ("exit 0", 0, {"requeue": "false"}, "the cluster's file has requeue: false"),
        ("exit 0", 0, {}, None),
    ],
)
def test_why_a_job_stays_away_is_said_in_the_table(
    tmp_path: Path,
    site: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    restarts: int,
    settings: dict[str, object],
    said: str | None,
) -> None:
    asked = site("scontrol", f'echo "$*" >&3\n{answer}')
    (tmp_path / "ranks").write_text("#!/bin/bash\n")
    (tmp_path / "ranks").chmod(0o755)
    assert ran(tmp_path, executor.REQUEUE, restarts, array=True, **settings) == executor.REQUEUE
    assert asked.exists() is (said != "the cluster's file has requeue: false" and restarts == 0)
    root = tmp_path / "run"
    attempt = {"attempt": 1, "reason": "preempted"}
    make_run(
        root, run=state(status="stopped", attempts=[attempt]),
        job={"job_id": "7_3", "cluster": {"executor": "slurm"}, "log_folder": str(tmp_path / "it's")},
    )  # fmt: skip
    monkeypatch.setattr(queue, "states", lambda ids: {"7_3": queue.JobState("FAILED")})
    (run,) = look([root])
    assert run.state == "stopped"
    assert run.note == ("preempted" if said is None else f"preempted; not run again: {said}")
    assert run.resumable


@pytest.mark.parametrize(
    ("code", "restarts", "excluded", "asked"),
    [
        (0, 0, None, []),
        (1, 0, None, []),
        (executor.REQUEUE, 0, None, ["requeue 7"]),
        # However often: a job of ten minutes comes back a hundred times, where submitit would count to three.
        (executor.REQUEUE, 99, None, ["requeue 7"]),
        (executor.REQUEUE, 100, None, []),
        (executor.REQUEUE, 1, "n3", ["requeuehold 7", "update JobId=7 ExcNodeList=n3", "release 7"]),
    ],
)
def test_the_script_asks_to_be_run_again(
    tmp_path: Path,
    site: Callable[[str, str], Path],
    code: int,
    restarts: int,
    excluded: str | None,
    asked: list[str],
) -> None:
    """The requeue's own SIGTERM comes while its command is at work, and ends neither that nor the rest."""
    said = site("scontrol", 'kill -TERM $PPID; kill -TERM $$; kill -CONT $$; echo "$*" >&3')
    site("srun", f"exit {code}")
    cluster = load_cluster("clusters/slurm", ["minutes=10"])
    script = executor.script(cluster, folder=tmp_path, code=tmp_path / "code", name="n")
    if excluded is not None:
        (tmp_path / f"7.{executor.EXCLUDED}").write_text(excluded)
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    ended = subprocess.run(["bash"], input=script, text=True, env=environment, check=False)
    assert ended.returncode == code
    assert (said.read_text().splitlines() if said.exists() else []) == asked


def test_a_job_submitted_from_a_job_knows_the_cluster_and_not_the_jobs_size(
    tmp_path: Path, site: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = site("sbatch", "env >&3; echo Submitted batch job 8")
    monkeypatch.setenv("SLURM_CONF", "/etc/site/slurm.conf")
    monkeypatch.setenv("SLURM_NTASKS", "64")
    cluster = load_cluster("clusters/slurm")
    assert executor.submit([print], cluster, folder=tmp_path / "logs", code=tmp_path, name="n") == ["8"]
    environment = said.read_text().splitlines()
    assert "SLURM_CONF=/etc/site/slurm.conf" in environment
    assert not [line for line in environment if line.startswith("SLURM_NTASKS=")]


def test_overrides_of_the_cluster_have_a_plus_in_front() -> None:
    given = ["train.duration=4 steps", "+nodes=2", "run.dir=a+b", "++x=1"]
    assert parted(given) == (["train.duration=4 steps", "run.dir=a+b"], ["nodes=2", "+x=1"])
