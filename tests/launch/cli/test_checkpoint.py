"""`keel checkpoint`: what it lists, what it finds damaged, and what it never removes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.cli.main import main
from pretrain import checkpoint
from pretrain.engines import storage
from tests.places import FullDisk

Said = tuple[int, str, str]


@pytest.fixture
def keel(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["keel", "checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with whole checkpoints at steps 10 to 40; that at 20 is pinned."""
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").touch()
    for step, attempt in ((10, 1), (20, 1), (30, 2), (40, 2)):
        folder = root / "checkpoints" / f"step-{step:08d}-a{attempt:02d}"
        folder.mkdir(parents=True)
        part = storage.Fragment("model/w", torch.ones(100), 0, 100)
        files = [storage.write_fragments(folder, rank, [part]) for rank in range(2)]
        extra = {"step": step, "samples": 32 * step}
        storage.write_index(folder, files, {}, {"ranks": 2, "zero_stage": 1, "extra": extra})
    checkpoint.pin(root, "best knn/top1", "step-00000020-a01", value=71.0)
    return root


def damaged(run: Path, name: str) -> Path:
    file = run / "checkpoints" / name / "rank-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 8]))
    return file


def names(run: Path) -> list[int]:
    return [each.step for each in checkpoint.published(run)]


def test_list_tells_everything_from_the_indexes(keel: Callable[..., Said], run: Path) -> None:
    (run / "checkpoints" / "step-00000030-a02" / storage.INDEX).unlink()
    code, out, _ = keel("list", run, "--json")
    rows = json.loads(out)
    assert code == 0 and [row["step"] for row in rows] == [40, 30, 20, 10]
    assert rows[0] | {"saved": "", "bytes": 0} == {
        "name": "step-00000040-a02", "step": 40, "attempt": 2, "samples": 1280, "ranks": 2, "zero_stage": 1,
        "bytes": 0, "saved": "", "pins": [], "problem": None,
    }  # fmt: skip
    assert "checkpoint.json: No such file" in rows[1]["problem"] and rows[1]["samples"] is None
    assert rows[2]["pins"] == ["best knn/top1"] and rows[2]["bytes"] > 800
    lines = keel("list", run)[1].splitlines()
    assert len(lines) == 5 and lines[3].endswith("kept: best knn/top1")


def test_verify_names_the_damaged_file(keel: Callable[..., Said], run: Path) -> None:
    assert keel("verify", run)[0] == 0
    file = damaged(run, "step-00000030-a02")
    code, out, _ = keel("verify", run)
    assert code == 1
    assert out.splitlines()[:2] == [
        "step-00000040-a02: whole",
        f"step-00000030-a02: {file}: its checksum isn't the one it was written with",
    ]
    assert keel("verify", run, "--step", 40)[0] == 0
    code, out, _ = keel("verify", run, "--json", "--step", 30)
    assert code == 1 and str(file) in json.loads(out)[0]["problem"]
    code, _, err = keel("verify", run, "--step", 7)
    assert code == 2 and "no checkpoint at step 7; there are: 40, 30, 20, 10" in err


def test_prune_keeps_the_newest_valid_and_the_pinned(keel: Callable[..., Said], run: Path) -> None:
    damaged(run, "step-00000040-a02")
    code, out, _ = keel("prune", run, "--keep", 1, "--dry-run", "--json")
    assert code == 0 and names(run) == [40, 30, 20, 10]
    expected = ["step-00000040-a02", "step-00000010-a01"]
    assert json.loads(out) == {"removed": expected, "dry_run": True}
    code, out, _ = keel("prune", run, "--keep", 1)
    assert code == 0 and out.splitlines() == [f"removed {name}" for name in expected]
    assert names(run) == [30, 20]
    assert keel("prune", run, "--keep", 1)[1] == "nothing to remove\n"


def test_prune_removes_nothing_where_nothing_is_valid(keel: Callable[..., Said], run: Path) -> None:
    for each in checkpoint.published(run):
        damaged(run, each.path.name)
    code, _, err = keel("prune", run, "--keep", 1)
    assert code == 2 and "none of its 4 checkpoints is valid, so none is removed" in err
    assert len(names(run)) == 4


def test_what_is_no_run_is_one_line(keel: Callable[..., Said], tmp_path: Path) -> None:
    for command in (["list"], ["verify"], ["prune", "--keep", 1]):
        code, out, err = keel(*command, tmp_path)
        assert (code, out) == (2, "")
        assert err == f"error: {tmp_path}: not a run folder (no config.yaml in it)\n"
    assert keel("prune", tmp_path, "--keep", 0)[0] == 2


def test_a_disk_that_takes_no_rename_is_a_line(keel: Callable[..., Said], run: Path) -> None:
    with FullDisk(run, 0):
        code, _, err = keel("prune", run, "--keep", 1)
    assert code == 2 and "No space left on device" in err and str(run) in err
    assert names(run) == [40, 30, 20, 10] and keel("verify", run)[0] == 0
    assert keel("prune", run, "--keep", 1)[0] == 0 and names(run) == [40, 20]
