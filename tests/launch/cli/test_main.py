"""What the command does with names that aren't text, with pipes nobody reads and with disks that are full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main as command
from launch.cli.main import main

KEEL = [sys.executable, "-m", "launch"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs whose names no encoding has as a whole."""
    for name in (b"gr\xf6\xdfe", "größe 100% = 'a\"b' \N{CJK UNIFIED IDEOGRAPH-732B}".encode(), b"x" * 200):
        run = tmp_path / os.fsdecode(name)
        run.mkdir()
        (run / "config.yaml").touch()
        (run / "run.json").write_text('{"status": "done"}')
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_that_an_encoding_lacks_are_printed_all_the_same(root: Path, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "400"}
    done = subprocess.run([*KEEL, "runs", root], env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and done.stderr == b""
    if encoding != "ascii":  # which click takes for a mistake of the environment's, and prints UTF-8
        assert b"gr\xf6\xdfe" in done.stdout, "a name that isn't text, byte for byte"
        assert "größe".encode(encoding) in done.stdout
    missing = root / os.fsdecode(b"n\xf6")
    done = subprocess.run([*KEEL, "runs", missing], env=environment, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("command", ["runs", "--help"])
def test_a_pipe_that_nobody_reads_is_no_fault(root: Path, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [command, *([str(root)] if command == "runs" else [])]
    done = subprocess.run([*KEEL, *arguments], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_output_to_a_full_disk_is_a_line(root: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*KEEL, "runs", root], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and b": No space left on device" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(28, "No space left on device", "/data/x"),
            2,
            "error: /data/x: No space left on device; free",
        ),
        (OSError(30, "Read-only file system", "/data/x"), 2, "error: /data/x: Read-only file system; choose"),
        (PermissionError(13, "Permission denied", "/data/x"), 2, "error: /data/x: Permission denied; look"),
        (FileNotFoundError(2, "No such file or directory", "/data/x"), 1, "Traceback"),
        (OSError("something else"), 1, "Traceback"),
        (ValueError("ours"), 1, "Traceback"),
    ],
)
def test_a_place_is_a_line_and_our_own_mistake_isnt(
    error: Exception,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**named: object) -> None:
        raise error

    monkeypatch.setattr(command, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(said)
