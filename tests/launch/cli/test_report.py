"""`keel report`: a sweep by its folder or by all that lies in it, and places that can't be written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.places import unprivileged
from tests.pretrain.report.told import run_folder

Said = tuple[int, str, str]
Keel = Callable[..., Said]


def test_a_sweep_is_named_by_its_folder_or_by_what_is_in_it(keel: Keel, tmp_path: Path) -> None:
    sweep, page = tmp_path / "größe='x' 100%", tmp_path / "page.html"
    for lr in (0.1, 0.01):
        run_folder(sweep / f"mae-lr={lr}", steps=9, lr=lr, pictures=())
    (sweep / "sweep.json").write_text("{}")
    code, out, err = keel("report", sweep, "-o", page)
    assert (code, out, err) == (0, f"{page}: open it in a browser\n", "")
    assert "2 runs" in page.read_text() and "<span>lr=0.1</span>" in page.read_text()
    code, _, err = keel("report", *sorted(sweep.iterdir()), "-o", page)
    assert code == 0 and "sweep.json: not a run folder" in err and len(err.splitlines()) == 1
    (sweep / "mae-lr=0.1" / "run.json").write_text("{torn")
    code, _, err = keel("report", sweep, "-o", page)
    assert code == 0 and err.startswith("left out: ") and "run.json: can't be read" in err
    assert "isn't shown" in page.read_text()


def test_what_can_not_be_shown_or_written_is_a_line(keel: Keel, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", steps=9, pictures=())
    before = sorted(tmp_path.rglob("*"))
    for arguments, said in (
        ((tmp_path / "nowhere",), "nowhere: not a run folder: there is nothing"),
        ((run, "-o", tmp_path), "is a folder; name a file"),
        ((run, "-o", run / "config.yaml" / "x.html"), "can't be written"),
        ((run, "-o", tmp_path / ("x" * 300 + ".html")), "can't be written (File name too long)"),
    ):
        code, out, err = keel("report", *arguments)
        assert code == 2 and said in err and not out and len(err.splitlines()) == 1, err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_written_is_a_line(tmp_path: Path) -> None:
    run, closed = run_folder(tmp_path / "run", steps=9, pictures=()), tmp_path / "closed"
    closed.mkdir(0o555)
    told = subprocess.run(
        [*unprivileged(), sys.executable, "-m", "launch", "report", run, "-o", closed / "r.html"],
        capture_output=True, text=True, timeout=240, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert told.returncode == 2 and not list(closed.iterdir())
    assert told.stderr == f"error: {closed / 'r.html'}: can't be written (Permission denied); " \
                          "choose another place with -o\n"  # fmt: skip
