"""Marked tests run where they should, and a required test that skips is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.selection import *\n"
        "def pytest_configure(config):\n"
        "    for mark in ('slurm', 'torture'): config.addinivalue_line('markers', mark)\n"
    )
    (tmp_path / "test_it.py").write_text("import pytest\n" + body)
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
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
