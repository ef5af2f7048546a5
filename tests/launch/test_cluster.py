"""Cluster files: what can't be is refused in a line; a script holds what the file asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ConfigError, RunError
from launch import slurm
from launch.cluster import load_cluster


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["gpus_per_node=4", "tasks_per_node=2"], "each rank has one GPU"),
        (["minutes=1"], "signal_delay: found 120 s"),
        (["executor=local", "nodes=2"], "executor local has this machine only"),
        (["executor=debug", "tasks_per_node=2"], "executor debug runs one task"),
        (["node=3"], "did you mean nodes"),
    ],
)
def test_the_impossible_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_cluster("clusters/slurm", settings)


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
    script = slurm.script(cluster, folder=tmp_path / "a b", code=tmp_path / "code", name="n", count=9)
    for line in (
        "--nodes=3", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=1536M",
        "--time=90", "--partition=p", "--account=a", "--qos=q", "--constraint=c", "--exclude=n9",
        "--exclusive", "--array=0-8%4", "--signal=USR2@200", "--mail-type=END", "--requeue", "--job-name=n",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load cuda\n" in script
    assert "export NCCL_SOCKET_IFNAME='ib 0'\n" in script
    assert " apptainer exec x.sif /opt/python -u -m submitit.core._submit " in script
    assert "-lt 7 ]" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="needs sbatch"):
        slurm.submit([print], load_cluster("clusters/slurm"), folder=tmp_path, code=tmp_path, name="n")


def test_ports_of_neighbouring_jobs_and_restarts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    place = slurm.Place(1, 4, 1, 2, 0, ("node1", "node2"), "7", Path())
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


@pytest.mark.parametrize(
    ("code", "restarts", "excluded", "asked"),
    [
        (0, 0, None, []),
        (1, 0, None, []),
        (slurm.REQUEUE, 0, None, ["requeue 7"]),
        # However often: a job of ten minutes comes back a hundred times, where submitit would count to three.
        (slurm.REQUEUE, 99, None, ["requeue 7"]),
        (slurm.REQUEUE, 100, None, []),
        (slurm.REQUEUE, 1, "n3", ["requeuehold 7", "update JobId=7 ExcNodeList=n3", "release 7"]),
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
    script = slurm.script(cluster, folder=tmp_path, code=tmp_path / "code", name="n")
    if excluded is not None:
        (tmp_path / f"7.{slurm.EXCLUDED}").write_text(excluded)
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
    assert slurm.submit([print], cluster, folder=tmp_path / "logs", code=tmp_path, name="n") == ["8"]
    environment = said.read_text().splitlines()
    assert "SLURM_CONF=/etc/site/slurm.conf" in environment
    assert not [line for line in environment if line.startswith("SLURM_NTASKS=")]
