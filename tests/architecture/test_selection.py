"""Marked tests run where they should, and a required test that skips is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, body: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.selection import *\n"
        "def pytest_configure(config):\n"
        "    for mark in ('slurm', 'torture'): config.addinivalue_line('markers', mark)\n"
    )
    (tmp_path / "test_it.py").write_text("import pytest\n" + body)
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
    command += options
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize(("required", "code"), [("", 0), ("chromium", 0), ("chromium slurm", 1)])
def test_a_skip_of_a_required_test_fails(tmp_path: Path, required: str, code: int) -> None:
    body = "@pytest.mark.slurm\ndef test_it(): pytest.skip('no slurmctld here')\n"
    done = run(tmp_path, body, KEEL_REQUIRED_MARKS=required)
    assert done.returncode == code, done.stdout
    assert ("slurm tests are required here, but" in done.stdout) == bool(code)


@pytest.mark.parametrize(("asked", "outcome"), [("0", "1 passed, 1 deselected"), ("1", "2 passed")])
def test_torture_runs_when_asked_for(tmp_path: Path, asked: str, outcome: str) -> None:
    body = "@pytest.mark.torture\ndef test_long(): pass\ndef test_short(): pass\n"
    assert outcome in run(tmp_path, body, KEEL_TORTURE=asked).stdout


def test_in_two_processes_files_stay_whole_and_slurms_come_first_in_one(tmp_path: Path) -> None:
    body = """
import os, pathlib, time
import pytest
@pytest.mark.parametrize("n", range(4))
def test_it(n):
    time.sleep(0.1)
    with open(pathlib.Path(__file__).parents[2] / "order", "a") as file:
        print(pathlib.Path(__file__).parent.name, os.environ["PYTEST_XDIST_WORKER"], file=file)
"""
    for name in ("slurm/test_a.py", "slurm/test_b.py", "c/test_c.py", "d/test_d.py"):
        name = f"tests/{name}"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body)
    done = run(tmp_path, "", "--numprocesses=2", "--import-mode=importlib")
    assert "16 passed" in done.stdout, done.stdout + done.stderr
    ran = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    workers = {folder: {worker for name, worker in ran if name == folder} for folder in ("slurm", "c", "d")}
    assert all(len(where) == 1 for where in workers.values()), ran
    assert workers["slurm"] != workers["c"] == workers["d"]
    first = {worker: name for name, worker in reversed(ran)}
    assert set(first.values()) == {"slurm", "c"}


@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_names_in_any_bytes_dont_end_a_run_in_two_processes(tmp_path: Path, outcome: str) -> None:
    body = f"def test_it():\n    print('caf\\udce9')\n    assert {outcome == 'passed'}, 'caf\\udce9'\n"
    done = run(tmp_path, body, "--numprocesses=2")
    assert f"1 {outcome}" in done.stdout and "INTERNALERROR" not in done.stdout, done.stdout
