"""Which nodes are blamed for the end of a start, and which starts are older than others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import nodes
from launch.slurm.incarnation import Incarnation

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
    run.write_text(json.dumps({"attempts": [{"attempt": 1}, {"attempt": 2, "ended": "now"}]}))
    assert nodes.bad(tmp_path, ["b"]) == []
    failures = json.loads((tmp_path / nodes.FILE).read_text())["failures"]
    assert failures == ({"a": 2} if blamed else {})


def test_without_slurm_nobody_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [{"attempt": 1}]}))
    assert [nodes.bad(tmp_path, ["a"]) for _ in range(4)] == [[]] * 4


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"starts": 3}', '{"starts": [1], "failures": {"a": "x"}}'])
def test_a_torn_record_costs_no_start(tmp_path: Path, told: Path, torn: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [{"attempt": 1}]}))
    (tmp_path / nodes.FILE).write_text(torn)
    assert nodes.bad(tmp_path, ["a"]) == []
    assert len(json.loads((tmp_path / nodes.FILE).read_text())["starts"]) == 1


def test_another_clusters_node_of_the_same_name_is_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    (tmp_path / nodes.FILE).write_text(json.dumps({"cluster": "one", "starts": [], "failures": {"a": 2}}))
    assert nodes.bad(tmp_path, ["a", "b"]) == ["a"]
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "two")
    assert nodes.bad(tmp_path, ["a", "b"]) == []


def test_an_earlier_attempts_end_isnt_taken_for_that_of_a_start_that_never_came_so_far(
    tmp_path: Path, told: Path
) -> None:
    """The node goes down while it loads its libraries: the last attempt there is ended well long before."""
    told.write_text(LINE.format(name="a", state="DOWN", boot="2020-01-01T00:00:00") + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [{"attempt": 1, "ended": "now"}]}))
    assert [nodes.bad(tmp_path, ["a"]) for _ in range(3)] == [[], [], ["a"]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Incarnation]:
    """A start as the nodes would see it."""

    def of(submission: int, job: str, restart: int = 0, cluster: str = "mini") -> Incarnation:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
        found = Incarnation.mine(submission)
        assert found is not None
        return found

    return of


def test_newer_starts_supersede_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., Incarnation]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert Incarnation.mine(1) is None
    first, second, third = start(1, "12"), start(1, "12", 1), start(2, "13")
    assert not first.superseded(tmp_path)
    second.announce(tmp_path)
    first.announce(tmp_path)  # late: it doesn't take back what the newer one said
    assert first.superseded(tmp_path) and not second.superseded(tmp_path)
    third.announce(tmp_path)
    assert second.superseded(tmp_path) and not third.superseded(tmp_path)
    (tmp_path / "incarnation.json").write_text("{")
    assert not first.superseded(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((1, "5012345", 3, "big"), (2, "71234", 0, "small")),  # another cluster, whose ids are lower
        ((1, "67043328", 0, "mini"), (2, "1", 0, "mini")),  # ids begin again
        ((1, "12", 9, "mini"), (2, "12", 0, "mini")),  # the same id, given away again
        ((3, "12", 0, "mini"), (3, "13", 0, "mini")),  # two submissions at the same moment
    ],
)
def test_job_ids_dont_say_which_start_is_newer(
    tmp_path: Path, start: Callable[..., Incarnation], old: tuple[Any, ...], new: tuple[Any, ...]
) -> None:
    before, after = start(*old), start(*new)
    for announced in ((before, after), (after, before)):
        (tmp_path / "incarnation.json").unlink(missing_ok=True)
        for each in announced:
            each.announce(tmp_path)
        assert before.superseded(tmp_path) and not after.superseded(tmp_path)


def test_a_file_of_before_submissions_were_counted_is_older(
    tmp_path: Path, start: Callable[..., Incarnation]
) -> None:
    (tmp_path / "incarnation.json").write_text('{"job": 5012345, "restart": 2}')
    new = start(1, "71234", 0, "small")
    assert not new.superseded(tmp_path)
    new.announce(tmp_path)
    assert json.loads((tmp_path / "incarnation.json").read_text())["job"] == "71234"
