"""`keel sync` as it is typed: which runs it sends, and one line where there is nothing to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

Said = tuple[int, str, str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs tracked offline: one to send, one sent, one that still trains; and one that never was."""
    for name, status in (("one", "done"), ("deep/two", "done"), ("three", "running"), ("four", "done")):
        run = tmp_path / name
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
        heartbeat = datetime.now(UTC).isoformat(timespec="seconds")
        (run / "run.json").write_text(json.dumps({"status": status, "heartbeat": heartbeat}))
        if name != "four":
            folder = run / "wandb" / "offline-run-20261101_120000-abcd1234"
            folder.mkdir(parents=True)
            (folder / "run-abcd1234.wandb").touch()
        if name == "deep/two":
            (folder / "run-abcd1234.wandb.synced").touch()
    return tmp_path


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """What a stand-in for W&B's command, found beside Python, was told."""
    program = root / "bin" / "wandb"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {root}/told\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))
    monkeypatch.setenv("NETRC", str(root / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    return root / "told"


def test_runs_below_a_root_are_sent_unless_they_train(
    keel: Callable[..., Said], root: Path, told: Path
) -> None:
    wanted = [f"{root}/deep/two: all is sent", f"{root}/one: 1 to send"]
    wanted.append(f"{root}/three: is being trained; sync it afterwards")
    code, said, _ = keel("sync", root, "--dry-run")
    assert (code, said.splitlines()) == (0, wanted)
    assert not told.exists()
    code, said, _ = keel("sync", root)
    assert (code, said.splitlines()) == (0, wanted)
    assert told.read_text() == f"sync {root}/one/wandb/offline-run-20261101_120000-abcd1234\n"


def test_no_key_and_no_offline_run_are_a_line_each(
    keel: Callable[..., Said], root: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    code, _, said = keel("sync", root)
    assert code == 2 and "no key is here" in said and said.count("\n") == 1
    code, _, said = keel("sync", root / "four")
    assert code == 2 and f"{root}/four: no run in it was tracked offline" in said and said.count("\n") == 1
    code, _, said = keel("sync", root / "nowhere")
    assert code == 2 and "no such folder" in said and said.count("\n") == 1
    assert not told.exists()
