"""A sweep on a real SLURM: submitted, listed, gone on with where it failed, its best exported; the doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli.main import main
from launch.doctor import examine
from launch.runs import queue
from launch.runs.queue import GONE
from launch.slurm.cluster import load_cluster
from tests.slurm.cluster import Cluster, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
LONG = 400.0
Keel = Callable[..., Any]


@pytest.fixture
def keel(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Keel:
    """Call the command in this process; gives what its --json says."""

    def call(*arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["keel", *map(str, arguments), "--json"])
        capfd.readouterr()
        try:
            main()
        except SystemExit as ended:
            assert not ended.code, capfd.readouterr()
        return json.loads(capfd.readouterr().out)

    return call


def sweep_file(tmp_path: Path, digits: Path, moved: Path) -> Path:
    """Six members of two objectives, two at a time; the last one's data will have gone when it starts."""
    good = f"{digits}/train/manifest.json"
    members: list[dict[str, Any]] = [{"run.seed": seed, "data.manifest": good} for seed in range(4)]
    members.append({"config": "smoke/moco", "run.seed": 4, "data.manifest": good})
    members.append({"run.seed": 5, "data.manifest": f"{moved}/train/manifest.json"})
    sweep = {
        "dir": str(tmp_path / "sweep"), "configs": ["smoke/mae"], "parallel": 2, "members": members,
        "overrides": {
            "train.duration": "4 steps", "optimizer.warmup": "2 steps", "data.workers": 0,
            "evaluate": [{"kind": "knn", "every": "2 steps", "data": str(digits)}],
        },
    }  # fmt: skip
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep))
    return file


def test_six_members_two_at_a_time_and_only_the_one_that_failed_again(
    slurm: Cluster, tmp_path: Path, digits: Path, keel: Keel
) -> None:
    moved = tmp_path / "data"
    moved.symlink_to(digits)
    file, root = sweep_file(tmp_path, digits, moved), tmp_path / "sweep"
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # no job starts yet
    first = keel("sweep", file, "--cluster", "clusters/slurm")
    assert [run["submit"] for run in first] == [True] * 6
    moved.unlink()
    assert {run["state"] for run in keel("runs", root)} == {"pending"}
    slurm.run("scontrol", "update", "PartitionName=main", "State=UP")

    at_once: list[int] = []

    def over() -> bool:
        states = queue.states([run["job"] for run in keel("runs", root)])
        at_once.append(sum(state.state == "RUNNING" for state in states.values()))
        return not any(state.active for state in states.values())

    until(over, "the sweep's first pass", LONG)
    assert max(at_once) == 2
    table = keel("runs", root, "--sort=job")
    assert [run["state"] for run in table] == ["done"] * 5 + ["failed"], table
    assert [run["objective"] for run in table] == ["mae"] * 4 + ["moco", "mae"]
    assert "manifest.json" in table[-1]["note"]
    assert all(run["best"]["metric"] == "knn/top1" and run["step"] == 4 for run in table[:5])

    moved.symlink_to(digits)
    again = keel("sweep", file, "--cluster", "clusters/slurm")
    assert [(run["run"], run["submit"]) for run in again if run["submit"]] == [(table[-1]["path"], True)]
    until(
        lambda: not any(run["state"] != "done" for run in keel("runs", root)), "the sweep's second pass", LONG
    )
    assert not any(run["submit"] for run in keel("sweep", file, "--cluster", "clusters/slurm"))

    ranked = keel("best", root, "--metric", "knn/top1", "--export", tmp_path / "export")
    assert len(ranked) == 6
    assert ranked[0]["value"] == max(run["value"] for run in ranked) and ranked[0]["exportable"]
    import timm

    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert model.num_features == 64


def test_cancel_saves_what_runs_and_takes_back_what_waits(
    slurm: Cluster, tmp_path: Path, digits: Path, keel: Keel
) -> None:
    file = tmp_path / "sweep.yaml"
    overrides = {
        "data.manifest": f"{digits}/train/manifest.json", "data.workers": 0, "train.duration": "100000 steps",
    }  # fmt: skip
    sweep = {
        "dir": str(tmp_path / "sweep"),
        "configs": ["smoke/mae"],
        "grid": {"run.seed": [0, 1]},
        "parallel": 1,
    }
    file.write_text(yaml.safe_dump(sweep | {"overrides": overrides}))
    keel("sweep", file, "--cluster", "clusters/slurm")

    def table() -> Any:
        return keel("runs", tmp_path / "sweep", "--sort=job")

    until(lambda: table()[0]["step"] >= 3, "three steps", LONG)
    assert [run["state"] for run in table()] == ["running", "pending"]
    paths = [run["path"] for run in table()]
    told = keel("cancel", *paths)
    assert ["saves and ends" in one["told"] for one in told] == [True, False]
    until(lambda: {run["state"] for run in table()} == {"cancelled"}, "both are cancelled", LONG)
    assert list((Path(paths[0]) / "checkpoints").glob("step-*"))
    assert keel("resume", tmp_path / "sweep", "--dry-run") == []


def test_the_doctor_and_the_queue_know_the_real_controller(
    slurm: Cluster, tmp_path: Path, digits: Path
) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", f"data.manifest={digits}/train/manifest.json"]

    def judged(*settings: str) -> tuple[str, str]:
        where = load_cluster("clusters/slurm", settings)
        (check,) = (one for one in examine("smoke/mae", overrides, where) if one.name == "queue")
        return check.verdict, check.found

    assert judged()[0] == "pass"
    verdict, said = judged("partition=nowhere")
    assert verdict == "fail" and "invalid partition" in said
    job = slurm.run("sbatch", "--parsable", "-t5", "-o", "/dev/null", "--wrap", "sleep 600").strip()
    until(lambda: queue.states([job])[job].state == "RUNNING", "the job runs")
    assert 0 < (queue.time_left(job) or 0) <= 300
    assert queue.states([job, "999999"])["999999"].state == GONE
    queue.requeue(job)
    until(lambda: queue.states([job])[job].restarts == 1, "the job is run again")
    queue.cancel([job])
    until(lambda: queue.states([job])[job].state == "CANCELLED", "the job is cancelled")
    queue.cancel([job], to_save=True)  # it is over already
