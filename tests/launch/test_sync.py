"""`keel sync` as it is typed: which runs it finds, and one line where there is nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Said = tuple[int, str, str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs that were tracked offline, the second uploaded already, and one that never was."""
    for name in ("one", "deep/two", "three"):
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").touch()
        if name != "three":
            folder = run / "wandb" / "offline-run-20261101_120000-abcd1234"
            folder.mkdir(parents=True)
            (folder / "run-abcd1234.wandb").touch()
    (folder / "run-abcd1234.wandb.synced").touch()
    return tmp_path


def test_runs_are_found_below_a_root(keel: Callable[..., Said], root: Path) -> None:
    code, said, _ = keel("sync", root, "--dry-run")
    assert (code, said) == (0, f"{root}/deep/two: 0 to send\n{root}/one: 1 to send\n")
    code, said, _ = keel("sync", root / "deep" / "two")
    assert (code, said) == (0, "nothing to send: all that W&B kept offline is uploaded\n")


def test_no_key_and_no_offline_run_are_a_line_each(
    keel: Callable[..., Said], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(root / "netrc"))
    code, _, said = keel("sync", root)
    assert code == 2 and "no key is here" in said and said.count("\n") == 1
    code, _, said = keel("sync", root / "three")
    assert code == 2 and f"{root}/three: no run in it was tracked offline" in said and said.count("\n") == 1
