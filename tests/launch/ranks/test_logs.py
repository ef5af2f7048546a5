"""What a rank writes is in its log, and on the console where it should be: Python, C and children alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.ranks.logs import rank_log, redirected


def test_python_c_and_children_write_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = rank_log(tmp_path / "logs", 3)
    with redirected(log, show=False) as console:
        print("from python")
        os.write(2, b"from c\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        assert console is None
    print("afterwards")
    text = log.read_text()
    assert log.name == "rank-00003.log"
    assert all(line in text for line in ("from python\n", "from c\n", "from a child\n"))
    assert "afterwards" not in text
    assert capfd.readouterr().out == "afterwards\n"


def test_shown_lines_are_whole_and_in_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "rank-00000.log"
    with redirected(log, show=True) as console:
        for number in range(1000):
            os.write(1 + number % 2, b"line %d" % number)
            os.write(1 + number % 2, b"\n")
        os.write(1, b"no newline at the end")
        assert console is not None
    wanted = "".join(f"line {number}\n" for number in range(1000)) + "no newline at the end"
    assert log.read_text().partition("\n")[2] == wanted
    assert capfd.readouterr().err == wanted + "\n"


def test_an_attempt_appends_and_says_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    log = tmp_path / "rank-00001.log"
    for text in ("first", "second"):
        with redirected(log, show=False):
            print(text)
    lines = log.read_text().splitlines()
    assert [lines[1], lines[3]] == ["first", "second"]
    assert f"rank 1 of 4, process {os.getpid()} on " in lines[0]


def test_a_progress_bar_still_has_a_terminal(tmp_path: Path) -> None:
    """On a pseudo-terminal: the stream given is one, standard error isn't, lines wipe the bar's line."""
    ours, theirs = os.openpty()
    code = (
        "import os, sys; from pathlib import Path; from launch.ranks.logs import redirected\n"
        f"with redirected(Path({str(tmp_path / 'log')!r}), show=True) as console:\n"
        "    console.write(f'bar {console.isatty()} {os.isatty(2)}'); console.flush()\n"
        "    os.write(2, b'a line\\n')\n"
    )
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 1000) == b"bar True False\r\x1b[2Ka line\r\n"
    os.close(ours)


def test_a_vanished_console_does_not_end_a_run(tmp_path: Path) -> None:
    """`keel train | head`: the reader of the console closes its end."""
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "import os; from pathlib import Path; from launch.ranks.logs import redirected\n"
        f"with redirected(Path({str(tmp_path / 'log')!r}), show=True) as console:\n"
        "    print('progress', file=console); print('line'); os.write(2, b'line\\n')\n"
    )
    subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=writer, check=True)
    os.close(writer)
    assert (tmp_path / "log").read_text().endswith("line\nline\n")
