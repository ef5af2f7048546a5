"""`keel report` as it is typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.pretrain.report.told import run_folder

Said = tuple[int, str, str]


def test_a_page_of_two_runs(keel: Callable[..., Said], tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, steps=30) for name in ("one", "two")]
    code, said, _ = keel("report", *runs, "-o", tmp_path / "page.html")
    assert (code, said) == (0, f"{tmp_path}/page.html: open it in a browser\n")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_what_is_no_run_is_a_line(keel: Callable[..., Said], tmp_path: Path) -> None:
    code, _, said = keel("report", tmp_path, "-o", tmp_path / "page.html")
    assert code == 2 and said.count("\n") == 1
    assert f"{tmp_path}: not a run folder" in said
    assert not (tmp_path / "page.html").exists()
