"""Which nodes are blamed for the end of a start, and which starts are older than others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import nodes
from launch.incarnation import Incarnation

LINE = "NodeName={name} Arch=x86_64 CPUs=4 State={state} BootTime={boot} SlurmdStartTime=None"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the `scontrol` of this test prints."""
    answer = tmp_path / "answer"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec /bin/cat {answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return answer


@pytest.mark.parametrize(
    ("state", "boot", "blamed"),
    [
        ("IDLE", "2020-01-01T00:00:00", False),
        ("DOWN*", "2020-01-01T00:00:00", True),
        ("MIXED+DRAIN", "2020-01-01T00:00:00", True),
        ("IDLE*", "None", True),
        ("IDLE", "2999-01-01T00:00:00", True),  # booted since
        ("ALLOCATED", "None", False),
    ],
)
def test_two_failures_of_a_node_are_enough(
    tmp_path: Path, told: Path, state: str, boot: str, blamed: bool
) -> None:
    told.write_text(LINE.format(name="a", state=state, boot=boot) + "\n")
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"attempts": [{"attempt": 1}]}))
    assert nodes.bad(tmp_path, ["a", "b"]) == []  # the first start blames nobody
    assert nodes.bad(tmp_path, ["a", "b"]) == []
    assert nodes.bad(tmp_path, ["a", "b"]) == (["a"] if blamed else [])
    run.write_text(json.dumps({"attempts": [{"attempt": 1, "ended": "now"}]}))
    assert nodes.bad(tmp_path, ["b"]) == []
    failures = json.loads((tmp_path / nodes.FILE).read_text())["failures"]
    assert failures == ({"a": 2} if blamed else {})


def test_without_slurm_nobody_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [{"attempt": 1}]}))
    assert [nodes.bad(tmp_path, ["a"]) for _ in range(4)] == [[]] * 4


def test_newer_starts_supersede_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert Incarnation.mine() is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    first = Incarnation.mine()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = Incarnation.mine()
    assert first and second and not first.superseded(tmp_path)
    second.announce(tmp_path)
    first.announce(tmp_path)  # late: it doesn't take back what the newer one said
    assert first.superseded(tmp_path) and not second.superseded(tmp_path)
    Incarnation(13, 0).announce(tmp_path)
    assert second.superseded(tmp_path)
    (tmp_path / "incarnation.json").write_text("{")
    assert not first.superseded(tmp_path)
