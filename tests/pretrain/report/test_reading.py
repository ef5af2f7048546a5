"""Run folders are read as they are found: whole, torn, under way, not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import RunError
from pretrain.report import report
from pretrain.report.charts import time_shares
from pretrain.report.curves import short
from pretrain.report.reading import names, read, read_columns
from pretrain.report.table import columns
from tests.places import FullDisk
from tests.pretrain.report.many import eighteen
from tests.pretrain.report.told import run_folder


def test_columns_of_uneven_rows(tmp_path: Path) -> None:
    """A column that begins late, one with a null, and a line that a kill has torn."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "loss": null}\n{"step": 2, "loss": 0.5, "late": 7}\n\n{"step": 3}\n{"step": 4, "l'
    )
    columns = read_columns(file)
    assert columns["step"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(columns["loss"], [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(columns["late"], [np.nan, 7, np.nan])
    file.write_text('{"step": 1}\nnot a row\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: holds a line that is no row"):
        read_columns(file)


def test_attempts_without_an_end_are_killed_or_still_run(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run", steps=90)
    [run] = read([root]).runs
    assert [attempt.reason for attempt in run.attempts] == ["preempted", "killed", "done"]
    killed = run.attempts[1]
    assert killed.ended == run.columns["time"][59], "its last row is the last that was seen of it"
    state = json.loads((root / "run.json").read_text())
    del state["attempts"][2]["ended"], state["attempts"][2]["reason"]
    (root / "run.json").write_text(json.dumps(state | {"status": "running"}))
    assert read([root]).runs[0].attempts[2].reason == "running"


def test_runs_have_the_shortest_names_that_tell_them_apart(tmp_path: Path) -> None:
    roots = [run_folder(tmp_path / place, steps=9) for place in ("a/run", "b/run")]
    assert [run.name for run in read(roots).runs] == ["a/run", "b/run"]
    assert [run.name for run in read([roots[0], roots[0]]).runs] == ["run"]


def test_where_the_time_went_adds_up(tmp_path: Path) -> None:
    """By hand: steps of 0.8 s, 0.1 of them waiting, a second from row to row, one save of 0.15 s told."""

    def stalled(row: dict[str, float]) -> dict[str, float]:
        return row | ({"checkpoint_stall": 0.15} if row["step"] == 50 else {})

    [run] = read([run_folder(tmp_path / "run", steps=90, change=stalled)]).runs
    shares = time_shares(0, run)
    assert shares is not None
    seconds = 90 - 3  # the hours between attempts, and what was before their first rows, don't count
    wanted = [0.7 * seconds, 0.1 * seconds, 0.15, 0.2 * seconds - 0.15]
    np.testing.assert_allclose(shares.total, np.array(wanted) / seconds, atol=1e-6)
    np.testing.assert_allclose(shares.shares.sum(axis=1), 1)
    assert shares.edges[-1] == 90 * 32 and (np.diff(shares.edges) > 0).all()


def test_bad_input_is_a_line_and_writes_nothing(tmp_path: Path) -> None:
    root, out = run_folder(tmp_path / "run", steps=9), tmp_path / "report.html"
    with pytest.raises(RunError, match="nowhere: not a run folder"):
        report([root, tmp_path / "nowhere"], out)
    with pytest.raises(RunError, match="is a folder; name a file"):
        report([root], tmp_path)
    with pytest.raises(RunError, match=r"can't be written .*choose another place"):
        report([root], tmp_path / "missing" / "report.html")
    (root / "config.yaml").write_text("[1, 2")
    with pytest.raises(RunError, match=r"config\.yaml: can't be read"):
        report([root], out)
    assert not out.exists()


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    root, out = tmp_path / "run", tmp_path / "report.html"
    root.mkdir()
    (root / "config.yaml").write_text("objective: {name: mae}\n")
    report([root], out)
    assert "No row of metrics yet" in out.read_text()


def test_a_folder_of_runs_stands_for_them_and_what_lies_beside_is_left_out(tmp_path: Path) -> None:
    """`keel report SWEEP` and `keel report SWEEP/*`, with what a sweep keeps beside its runs."""
    eighteen(tmp_path)
    sweep = tmp_path / "sweep"
    whole, listed = read([sweep]), read(sorted(sweep.iterdir()))
    assert [run.root for run in whole.runs] == [run.root for run in listed.runs] and len(whole.runs) == 18
    assert whole.left_out == []
    assert [Path(place).name for place, _ in listed.left_out] == ["submissions", "sweep.json"]
    with pytest.raises(RunError, match=r"not a run folder.*name folders of runs, or one that holds some"):
        read([sweep / "sweep.json", sweep / "submissions"])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "[1, 2"),
        ("config.yaml", "- a list"),
        ("run.json", "{torn"),
        ("run.json", "[]"),
        ("run.json", '{"attempts": {"a": 1}}'),
        ("run.json", '{"attempts": [3]}'),
        ("metrics.jsonl", '{"step": null}\n'),
        ("metrics.jsonl", "3\n"),
        ("config.yaml", "\x00\xff"),
    ],
)
def test_one_run_that_cannot_be_read_is_said_and_the_others_are_shown(
    tmp_path: Path, file: str, content: str
) -> None:
    runs = [run_folder(tmp_path / name, steps=9, pictures=()) for name in ("a", "b", "c")]
    (runs[1] / file).write_text(content, encoding="latin-1")
    found = read(runs)
    assert [run.name for run in found.runs] == ["a", "c"]
    [(place, why)] = found.left_out
    assert place == "b" and str(runs[1]) in why and len(why.splitlines()) == 1
    report(runs, tmp_path / "report.html")
    assert "isn't shown" in (tmp_path / "report.html").read_text()
    with pytest.raises(RunError, match=str(runs[1])):
        read(runs[1:2])


def test_steps_and_loss_are_those_of_the_rows_and_the_state_is_what_was_asked_for(tmp_path: Path) -> None:
    """run.json of a run that fails is as old as its last heartbeat."""
    root = run_folder(tmp_path / "run", steps=12, pictures=())
    (root / "run.json").write_text('{"status": "running", "step": 1, "samples": 32, "total_steps": 24}')
    [run] = read([root]).runs
    assert (run.step, run.samples, run.status) == (12, 384, "running")
    [run] = read([root], {root.resolve(): ("lost", "node gone")}).runs
    assert (run.status, run.note, run.failed) == ("lost", "node gone", True)
    cells = {column.title: column.cells[0] for column in columns([run])}
    assert cells["Steps"].text == "12 of 24" and cells["State"].ill
    last = run.last("loss")
    assert last is not None and cells["Last loss"].text == short(last)


@pytest.mark.parametrize(
    ("folders", "told"),
    [
        (["s/mae-lr=0.1-00c0ffee", "s/mae-lr=0.01-0badcafe"], ["lr=0.1", "lr=0.01"]),
        (["s/mae-lr=0.1-00c0ffee", "s/mae-lr=0.1-0badcafe"], ["00c0ffee", "0badcafe"]),
        (["s/run", "s/run-2"], ["run", "run-2"]),
        (["a/x-seed=1", "b/x-seed=1"], ["a/x-seed=1", "b/x-seed=1"]),
        (["s/größe=%d 'q'", "s/größe=猫"], ["größe=%d 'q'", "größe=猫"]),
        (["s/only"], ["only"]),
    ],
)
def test_what_all_names_begin_with_goes_and_what_tells_them_apart_stays(
    folders: list[str], told: list[str]
) -> None:
    assert names([Path("/runs", folder) for folder in folders]) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (2.5e19, "2.5e19"),
        (1e15, "1e15"),
        (2.5e12, "2.5T"),
        (-3e30, "-3e30"),
        (1.7e308, "1.7e308"),
        (5e-324, "4.94e-324"),
    ],
)
def test_numbers_of_any_size_read_well(value: float, told: str) -> None:
    assert short(value) == told


@pytest.mark.parametrize("name", ["größe 猫.html", "a%20b='c'.html", 'q"u.html', "x" * 195 + ".html"])
def test_a_page_may_have_any_name(tmp_path: Path, name: str) -> None:
    root = run_folder(tmp_path / name.removesuffix(".html"), steps=9)
    report([root], tmp_path / name)
    assert (tmp_path / name).read_text().startswith("<!doctype html>")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([root.name, name])


def test_a_full_disk_is_a_line_and_leaves_the_old_page(tmp_path: Path) -> None:
    root, place = run_folder(tmp_path / "run", steps=9, pictures=()), tmp_path / "out"
    place.mkdir()
    (place / "report.html").write_text("old")
    with FullDisk(place) as disk:
        report([root], place / "report.html")
    assert disk.calls >= 3
    (place / "report.html").write_text("old")
    for at in range(disk.calls):
        with (
            FullDisk(place, at),
            pytest.raises(RunError, match=r"report.html: can't be written \(No space left"),
        ):
            report([root], place / "report.html")
        assert [(each.name, each.read_text()) for each in place.iterdir()] == [("report.html", "old")], at
