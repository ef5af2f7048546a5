"""metrics.jsonl: whole rows, exact numbers, steps strictly increasing through every resume and crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs.errors import RunError
from pretrain.tracking.jsonl import Jsonl, rows, undo_after


def write(path: Path, steps: range, attempt: int = 1) -> None:
    tracker = Jsonl(path, path.parent / "pictures")
    for step in steps:
        tracker.log({"attempt": attempt, "step": step, "loss": 1 / step})
    tracker.finish("done")


def steps(path: Path) -> list[int]:
    return [row["step"] for row in rows(path)]


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_come_back_exactly(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    tracker = Jsonl(path, path.parent)
    tracker.log({"step": 1, "loss": value})
    tracker.finish("done")
    assert rows(path)[0]["loss"] == value


def test_a_float32_loss_keeps_every_bit(tmp_path: Path) -> None:
    loss = torch.tensor(0.1) / 3
    tracker = Jsonl(tmp_path / "metrics.jsonl", tmp_path)
    tracker.log({"step": 1, "loss": float(loss)})
    assert torch.tensor(rows(tmp_path / "metrics.jsonl")[0]["loss"]).equal(loss)
    tracker.finish("done")


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    tracker = Jsonl(tmp_path / "metrics.jsonl", tmp_path)
    tracker.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    tracker.finish("done")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def test_one_row_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill between two system calls leaves whole rows."""
    written: list[bytes] = []
    tracker = Jsonl(tmp_path / "metrics.jsonl", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: written.append(data) or len(data))
        for step in (1, 2):
            tracker.log({"step": step, "loss": 0.5})
    tracker.finish("done")
    assert written == [b'{"step": 1, "loss": 0.5}\n', b'{"step": 2, "loss": 0.5}\n']


def test_undone_rows_move(tmp_path: Path) -> None:
    path, undone = tmp_path / "metrics.jsonl", tmp_path / "metrics.undone.jsonl"
    write(path, range(1, 11))
    assert undo_after(path, 6) == 10
    assert (steps(path), steps(undone)) == ([*range(1, 7)], [*range(7, 11)])
    write(path, range(7, 9), attempt=2)
    assert undo_after(path, 7) == 10  # sent as far as 10 once, though this attempt got to 8
    assert (steps(path), steps(undone)) == ([*range(1, 8)], [7, 8, 9, 10, 8])
    assert [row["attempt"] for row in rows(undone)] == [1, 1, 1, 1, 2]


def test_nothing_to_undo(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert undo_after(path, 0) == 0
    path.touch()
    assert undo_after(path, 0) == 0
    write(path, range(1, 4))
    before = path.read_bytes()
    assert undo_after(path, 3) == 3
    assert path.read_bytes() == before
    assert not (tmp_path / "metrics.undone.jsonl").exists()


def test_everything_is_undone_when_a_run_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    assert undo_after(path, 0) == 3
    assert path.read_bytes() == b""
    assert steps(tmp_path / "metrics.undone.jsonl") == [1, 2, 3]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert undo_after(path, 3) == 3
    write(path, range(4, 5))
    assert steps(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("instant", range(4))
def test_a_kill_while_undoing_loses_and_doubles_nothing(
    tmp_path: Path, instant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash at each durable step, the append cut in the middle included, then resume again."""
    path, undone = tmp_path / "metrics.jsonl", tmp_path / "metrics.undone.jsonl"
    write(path, range(1, 11))
    original, calls = os.fsync, []

    def crash(file: int) -> None:
        calls.append(file)
        if len(calls) > instant // 2:
            raise KeyboardInterrupt
        original(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", crash)
        undo_after(path, 6)
        pytest.fail("two flushes to disk are needed")
    if instant % 2 and undone.exists():
        undone.write_bytes(undone.read_bytes()[:-5])
    if instant == 3:  # appended, cut off here, and then the other file lost its tail: rows are gone for good
        return
    undo_after(path, 6)
    assert (steps(path), steps(undone)) == ([*range(1, 7)], [*range(7, 11)])


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n')
    with pytest.raises(
        RunError, match=r"metrics\.jsonl: holds a line that is no row of metrics \(b'hello'\)"
    ):
        undo_after(path, 0)


def test_pictures_are_png_files(tmp_path: Path) -> None:
    tracker = Jsonl(tmp_path / "metrics.jsonl", tmp_path / "pictures")
    image = torch.zeros(3, 4, 6)
    image[0, 0, 0], image[2, 3, 5] = 1.0, 2.0  # red at the top left; beyond white is clipped
    tracker.pictures(12, {"reconstructions": image})
    tracker.finish("done")
    [file] = (tmp_path / "pictures").iterdir()
    assert file.name == "step-00000012-reconstructions.png"
    with Image.open(file) as png:
        assert png.size == (6, 4)
        assert png.getpixel((0, 0)) == (255, 0, 0)
        assert png.getpixel((5, 3)) == (0, 0, 255)
