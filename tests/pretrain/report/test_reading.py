"""Run folders are read as they are found: whole, torn, under way, not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import RunError
from pretrain.report import report
from pretrain.report.charts import time_shares
from pretrain.report.reading import read, read_columns
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
