"""The injector fails what it should and nothing else; permission bits count for an unprivileged child."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import FullDisk, full_disk_environment, unprivileged


def work(folder: Path) -> None:
    folder.mkdir()
    with (folder / "a").open("w") as file:
        file.write("text")
    (folder / "b").write_bytes(b"bytes")
    handle = os.open(folder / "c", os.O_CREAT | os.O_WRONLY)
    try:
        os.write(handle, b"more")
        os.fsync(handle)
    finally:
        os.close(handle)
    (folder / "c").rename(folder / "d")
    shutil.copyfile(folder / "d", folder / "e")


def test_each_call_fails_in_turn_and_what_lies_elsewhere_does_not(tmp_path: Path) -> None:
    kept = io_state()
    with FullDisk(tmp_path / "disk") as counted:
        work(tmp_path / "disk")
    shutil.rmtree(tmp_path / "disk")
    kinds = [line.split()[0] for line in counted.log]
    assert {"mkdir", "open", "write", "fsync", "rename"} <= set(kinds)
    for at in range(counted.calls):
        with FullDisk(tmp_path / "disk", at) as disk, pytest.raises(OSError) as caught:
            (tmp_path / "elsewhere").write_text("room enough")
            work(tmp_path / "disk")
        assert caught.value.errno == errno.ENOSPC and disk.calls >= at + 1
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    assert io_state() == kept


def io_state() -> tuple[object, ...]:
    return open, os.write, os.rename, os.open


def test_a_child_process_meets_the_same_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = "import sys, pathlib; pathlib.Path(sys.argv[1], 'x').write_text('text')"
    for at, code in ((0, 1), (1, 1), (2, 0)):
        environment = full_disk_environment(tmp_path / "hook", disk, at)
        child = subprocess.run(
            [sys.executable, "-c", script, str(disk)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == code, child.stderr
        assert code == 0 or "No space left on device" in child.stderr


def test_permission_bits_count_for_an_unprivileged_child(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    script = "import sys, pathlib; pathlib.Path(sys.argv[1], 'x').write_text('text')"
    child = subprocess.run(
        [*unprivileged(), sys.executable, "-c", script, str(locked)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1 and "Permission denied" in child.stderr
