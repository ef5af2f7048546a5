"""A snapshot is importable, named by its content, and says where it comes from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import RunError
from launch.slurm import snapshot


def test_a_snapshot_runs_by_itself(tmp_path: Path) -> None:
    named = snapshot.place(tmp_path)
    assert not list(tmp_path.iterdir())
    folder = snapshot.take(tmp_path)
    assert snapshot.take(tmp_path) == folder == named
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    asked = "import launch.ranks.job, configs; print(launch.__file__, configs.__file__)"
    said = subprocess.run(
        [sys.executable, "-P", "-c", asked],
        env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert all(Path(path).is_relative_to(folder) for path in said.split())
    assert (folder / "configs" / "smoke" / "mae.yaml").is_file()
    assert "torch==" in (folder / "packages.txt").read_text()


def test_other_code_is_another_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = snapshot._files()
    first = snapshot.take(tmp_path)
    changed = tmp_path / "task.py"
    changed.write_text("changed\n")
    monkeypatch.setattr(snapshot, "_files", lambda: files | {"launch/slurm/task.py": changed})
    second = snapshot.take(tmp_path)
    assert second != first and (second / "launch" / "slurm" / "task.py").read_text() == "changed\n"


def test_no_place_for_it_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be copied here"):
        snapshot.take(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
