"""W&B without a network: one run through every restart, no step sent twice, offline where there is no key."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.tracking.wandb import Wandb, _mode, has_key
from pretrain.types import Progress, Scores
from tests.wandb_files import rows_of


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def attempt(root: Path, already_sent: int, steps: range) -> None:
    tracker = Wandb(
        root, mode="auto", project="keel", name="mine", tags=["a"], run_id="abcd1234",
        settings={"train": {"batch_size": 8}}, already_sent=already_sent,
    )  # fmt: skip
    for step in steps:
        tracker.log({"step": step, "loss": 1 / step, "objective/accuracy": step})
    last = Progress(step=steps[-1], samples=0, total_steps=9, dataset_size=1)
    tracker.evaluated(last, Scores("knn", {"top1": 61.0}))
    tracker.pictures(steps[-1], {"rebuilt": torch.rand(3, 8, 8)})
    tracker.finish("preempted")


def history(file: Path, count: int, patience: float = 20.0) -> list[dict[str, Any]]:
    """Rows of a finished run; W&B's own process may still be writing the last of them on a busy machine."""
    deadline = time.monotonic() + patience
    while len(rows := rows_of(file)) < count and time.monotonic() < deadline:
        time.sleep(0.2)
    return rows


def test_a_restart_goes_on_in_the_same_run_and_repeats_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 0, range(1, 6))
    [first] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    attempt(tmp_path, 5, range(4, 8))
    [second] = set(tmp_path.glob("wandb/offline-run-*/*.wandb")) - {first}
    assert first.name == second.name == "run-abcd1234.wandb"
    rows = history(first, 5), history(second, 2)
    assert [[row["_step"] for row in of] for of in rows] == [[1, 2, 3, 4, 5], [6, 7]]
    assert rows[0][0]["train/loss"] == 1.0
    assert rows[0][0]["objective/accuracy"] == 1
    assert rows[1][1]["knn/top1"] == 61.0
    assert rows[1][1]["pictures/rebuilt/_type"] == "image-file"


def test_the_death_of_its_process_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone:
        """A run whose service has died: whatever is asked of it raises, as W&B's own does."""

        calls = 0

        def log(self, *values: object, **more: object) -> None:
            self.calls += 1
            raise ConnectionResetError("Connection lost")

        @property
        def summary(self) -> dict[str, object]:
            raise ConnectionResetError("Connection lost")

    gone = Gone()
    monkeypatch.setattr("pretrain.tracking.wandb._start", lambda mode, **arguments: gone)
    attempt(tmp_path, 0, range(1, 6))
    assert gone.calls == 1
    assert caplog.messages == [
        "W&B is gone; going on without it until the next start: ConnectionResetError('Connection lost')"
    ]


def test_an_unreachable_server_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    original, modes = wandb.init, []

    def refuse_online(*, mode: str, **arguments: Any) -> Any:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return original(mode=mode, **arguments)

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", refuse_online)
    attempt(tmp_path, 0, range(1, 3))
    assert modes == ["online", "offline"]
    assert "tracking offline" in caplog.text
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_without_a_key_it_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_key()
    assert _mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert _mode("auto") == "online"
    assert _mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert _mode("auto") == "disabled"


def test_a_key_in_netrc_counts(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    assert has_key()
