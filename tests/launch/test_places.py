"""Folders that can't be written to and disks that are full, for what is done around runs: a line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.registry import make_run, state
from launch.runs.registry import list_runs
from launch.slurm.submission import Submission
from tests.places import FullDisk, unprivileged

Said = tuple[int, str, str]

DRIVER = """
import contextlib, io, json, sys
from launch.cli.main import main
found = {}
for line in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["keel", *line]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    found[" ".join(line[:2])] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    """Two runs in a folder of which nothing can be changed: one of a job, one with a checkpoint."""
    root = tmp_path / "sealed"
    job = {"job_id": "7", "cluster": {"executor": "slurm"}, "log_folder": str(root)}
    make_run(root / "job", run=state(status="stopped", attempts=[{"reason": "preempted"}]), job=job)
    make_run(root / "done", run=state(), evaluations={20: {"top1": 1.0}})
    folders = [path for path in (root, *root.rglob("*")) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    yield root
    for path in folders:
        path.chmod(0o755)


def test_what_cant_be_written_is_a_line_and_what_only_reads_goes_on(
    tmp_path: Path, sealed: Path, digits: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    overrides = {"data.manifest": f"{digits}/train/manifest.json", "train.duration": "4 steps"}
    asked = {"dir": f"{sealed}/sweep", "configs": ["smoke/mae"], "overrides": overrides}
    sweep.write_text(yaml.safe_dump(asked | {"grid": {"run.seed": [0, 1]}}))
    data = [f"data.manifest={digits}/train/manifest.json"]
    refused = [
        ["sweep", str(sweep)],
        ["submit", "smoke/mae", f"run.dir={sealed}/new", *data, "--cluster", "clusters/slurm"],
        ["cancel", str(sealed / "job")],
        ["doctor", "smoke/mae", f"run.dir={sealed}/new", *data],
    ]
    read = [
        ["runs", str(sealed)],
        ["best", str(sealed), "--metric", "knn/top1"],
        ["resume", str(sealed), "--dry-run"],
        ["checkpoint", "list", str(sealed / "done")],
    ]
    before = sorted(sealed.rglob("*"))
    command = [*unprivileged(), sys.executable, "-c", DRIVER, json.dumps([*refused, *read])]
    silent = tmp_path / "bin"
    silent.mkdir()
    for name in ("squeue", "sacct", "scontrol", "scancel"):
        (silent / name).write_text("#!/bin/sh\nexit 1\n")
        (silent / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{silent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for line in refused:
        code, out, err = found[" ".join(line[:2])]
        assert code == 2, (line, out, err)
        said = [text for text in (out + err).splitlines() if str(sealed) in text and "Permission" in text]
        assert len(said) == 1 or (line[0] == "doctor" and "can't be written to" in out), (line, out, err)
        assert "Traceback" not in out + err
    for line in read:
        code, out, err = found[" ".join(line[:2])]
        assert (code, err) == (0, ""), (line, out, err)
    assert sorted(sealed.rglob("*")) == before


@pytest.fixture
def taking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that takes every job."""
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = {
        "sbatch": "echo Submitted batch job 7", "squeue": "exit 1", "sacct": "exit 1", "scancel": "exit 0",
        "scontrol": "echo 'ClusterName = mini'",
    }  # fmt: skip
    for name, answer in answers.items():
        (programs / name).write_text(f"#!/bin/sh\n{answer}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")


def whole(root: Path) -> None:
    """Nothing below `root` that is read by its name is half there."""
    for path in root.rglob("*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text())
    for run in list_runs(root):
        assert not run.broken, run


@pytest.mark.usefixtures("taking")
@pytest.mark.parametrize("what", ["cancel", "submit", "sweep"])
def test_a_disk_that_fills_up_is_a_line_and_leaves_nothing_torn(
    tmp_path: Path, digits: Path, keel: Callable[..., Said], what: str
) -> None:
    overrides = {"data.manifest": f"{digits}/train/manifest.json", "train.duration": "4 steps"}

    def command(root: Path) -> list[Any]:
        if what == "cancel":
            make_run(root / "run", run=state(status="running", attempts=[{"attempt": 1}]))
            Submission("7", {"executor": "slurm"}, "", "", "", name="keel-run").write(root / "run")
            return ["cancel", root / "run"]
        root.mkdir()
        if what == "submit":
            settings = [f"{name}={value}" for name, value in overrides.items()]
            return ["submit", "smoke/mae", f"run.dir={root}/run", *settings]
        sweep = {"dir": f"{root}/sweep", "configs": ["smoke/mae"], "overrides": overrides}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"grid": {"run.seed": [0, 1]}}))
        return ["sweep", tmp_path / "sweep.yaml", "--cluster", "clusters/slurm"]

    root = tmp_path / "whole"
    asked = command(root)
    with FullDisk(root) as disk:
        assert keel(*asked)[0] == 0
    calls = disk.calls
    for number, at in enumerate(sorted({round(calls * part / 4) for part in range(4)} | {calls - 1})):
        root = tmp_path / f"full-{number}"
        asked = command(root)
        with FullDisk(root, at) as disk:
            code, out, err = keel(*asked)
        assert code == 2 and "No space left on device" in err, (at, disk.log[-1:], out, err)
        assert "Traceback" not in err and str(root) in err
        whole(root)
        assert keel(*asked)[0] == 0, "the same command goes on with the rest"
