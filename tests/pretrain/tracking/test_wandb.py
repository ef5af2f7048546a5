"""W&B without a network: one run through every restart, no step sent twice, offline where there is no key."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError, RunError
from configs.loading import load
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.ports import Scores
from pretrain.tracking.wandb import Wandb, _mode, has_key, offline_folders, upload
from tests.pretrain.tracking.server import server
from tests.waiting import wait_for
from tests.wandb_files import records, rows_of


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


Row = dict[str, float | int]
RECORD = [
    {"step": 3, "samples": 24, "name": "knn", "values": {"top1": 50.0}},
    {"step": 7, "samples": 56, "name": "knn", "values": {"top1": 61.0, "top5": 80}},
]
"""What RUN/evaluations.jsonl holds: the first row was written by an earlier attempt."""


def attempt(
    root: Path,
    already_sent: int,
    steps: range,
    *,
    end: str = "preempted",
    change: Callable[[Row], Row] = lambda row: row,
    record: Sequence[Mapping[str, Any]] = (),
) -> None:
    tracker = Wandb(
        root, mode="auto", project="keel", name="mine", tags=["a"], group="a-sweep", job_type="pretrain",
        run_id="abcd1234", settings={"train": {"batch_size": 8}, "provenance": {"commit": "0123abc"}},
        already_sent=already_sent, evaluations=lambda: record,
    )  # fmt: skip
    for step in steps:
        row = {
            "step": step,
            "loss": 1 / step,
            "grad_norm": 1.0,
            "objective/accuracy": step,
            "skipped_batches": 2,
        }
        tracker.log(change(row))
    last = Progress(step=steps[-1], samples=0, total_steps=9, dataset_size=1)
    tracker.evaluated(last, Scores("knn", {"top1": 61.0}))
    tracker.pictures(steps[-1], {"rebuilt": torch.rand(3, 8, 8)})
    tracker.finish(end)


def finished(root: Path) -> list[Any]:
    """Everything in the newest offline file, once it is whole: W&B's own process writes it."""
    newest = max(root.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)

    def whole() -> bool:
        return any(record.HasField("exit") for record in records(newest))

    wait_for(f"W&B's process to finish {newest}", whole)
    return list(records(newest))


def history(file: Path, count: int) -> list[dict[str, Any]]:
    """Rows of a finished run; W&B's own process may still be writing the last of them on a busy machine."""
    wait_for(f"{count} rows in {file}", lambda: len(rows_of(file)) >= count)
    return rows_of(file)


def test_a_restart_goes_on_in_the_same_run_and_repeats_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 0, range(1, 6))
    [first] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    attempt(tmp_path, 5, range(4, 8), record=RECORD)
    [second] = set(tmp_path.glob("wandb/offline-run-*/*.wandb")) - {first}
    assert first.name == second.name == "run-abcd1234.wandb"
    rows = history(first, 5), history(second, 2)
    assert [[row["_step"] for row in of] for of in rows] == [[1, 2, 3, 4, 5], [6, 7]]
    assert rows[0][0]["train/loss"] == 1.0
    assert rows[0][0]["objective/accuracy"] == 1
    assert rows[1][1]["knn/top1"] == 61.0
    assert rows[1][1]["pictures/rebuilt/_type"] == "image-file"
    assert rows[1][1]["pictures/rebuilt/caption"] == "rebuilt, step 7"
    assert "evaluations/_type" not in rows[0][-1]
    table = rows[1][1]["evaluations/path"]
    assert json.loads((second.parent / "files" / table).read_text()) == {
        "columns": ["step", "samples", "evaluation", "figure", "value"],
        "data": [[3, 24, "knn", "top1", 50.0], [7, 56, "knn", "top1", 61.0], [7, 56, "knn", "top5", 80.0]],
    }, "of the whole run, not of this attempt alone"


def test_a_run_tells_whose_it_is_what_made_it_and_how_its_machine_fared(tmp_path: Path) -> None:
    attempt(tmp_path, 0, range(1, 3), end="done")
    found = finished(tmp_path)
    [run] = [record.run for record in found if record.HasField("run")][:1]
    assert (run.project, run.run_group, run.job_type, list(run.tags)) == (
        "keel",
        "a-sweep",
        "pretrain",
        ["a"],
    )
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"] == {"batch_size": 8} and config["provenance"] == {"commit": "0123abc"}
    assert any(record.HasField("stats") for record in found), "system metrics"
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]


def ill(row: Row) -> Row:
    """Step 2 has a loss that is NaN; between steps 3 and 4 three updates couldn't be applied."""
    return row | {
        "loss": float("nan") if row["step"] == 2 else 1.0,
        "skipped_batches": 5 if row["step"] > 3 else 2,
    }


@pytest.mark.parametrize(
    ("already_sent", "end", "heard"),
    [
        (0, "done", ["2 batches were skipped", "loss is nan", "3 batches were skipped", "at step 5"]),
        (1, "failed", ["loss is nan", "3 batches were skipped", "at step 5"]),
        (1, "preempted", ["loss is nan", "3 batches were skipped"]),
    ],
)
def test_somebody_is_told_of_nan_and_of_the_end(
    tmp_path: Path, already_sent: int, end: str, heard: list[str]
) -> None:
    """A resumed run doesn't tell again what was skipped before, and one that goes on by itself no end."""
    attempt(tmp_path, already_sent, range(1, 6), end=end, change=ill)
    found = finished(tmp_path)
    alerts = [record.alert for record in found if record.HasField("alert")]
    assert len(alerts) == len(heard)
    assert all(wanted in alert.text for wanted, alert in zip(heard, alerts, strict=True))
    assert all(alert.title.startswith("mine: ") and str(tmp_path) in alert.text for alert in alerts)
    levels = {"done": "INFO", "failed": "ERROR", "preempted": "WARN"}
    assert alerts[-1].level == levels[end]
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [int(end == "failed")]


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
        "W&B is gone; going on without it until the next start: ConnectionResetError('Connection lost') "
        f"(what it kept of this attempt: {tmp_path}/wandb; `wandb sync` sends that)"
    ]


def own(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What keel said of it; W&B's client keeps a log of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("pretrain")]


@contextmanager
def answering(status: int | None) -> Iterator[str]:
    """A server's URL: it says `status` to everything; None: it takes connections and says nothing."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            if status is None:
                ended.wait(60)
                return
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        ended.set()
        listening.shutdown()


@contextmanager
def nobody() -> Iterator[str]:
    """A URL where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    "server_like",
    [
        pytest.param(nobody, id="no route"),
        pytest.param(partial(answering, 401), id="a key that isn't known"),
        pytest.param(partial(answering, None), id="no answer"),
    ],
)
def test_a_server_that_cant_be_had_does_not_stop_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    server_like: Callable[[], AbstractContextManager[str]],
) -> None:
    """W&B's own client: what it couldn't send while training waits for `keel sync`, which sends it all."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("pretrain.tracking.wandb.INIT_PATIENCE", 3.0)
    with server_like() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        attempt(tmp_path, 0, range(1, 4), end="done")
    [said] = own(caplog)
    assert said.startswith("W&B can't be had, tracking offline; `keel sync` sends it later: ")
    finished(tmp_path)
    waiting = offline_folders(tmp_path)
    assert len(waiting) == 1
    with server() as received:
        monkeypatch.setenv("WANDB_BASE_URL", received.url)
        upload(waiting)
        [(run, rows)] = received.history.items()
    assert run == "abcd1234" and [row["_step"] for row in rows] == [1, 2, 3]
    assert offline_folders(tmp_path) == []


def test_a_client_that_cant_start_at_all_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def broken(**arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", broken)
    attempt(tmp_path, 0, range(1, 4), end="done", record=RECORD)
    [said] = own(caplog)
    assert said.startswith("W&B can't be started; going on without it until the next start: ")


def test_a_folder_whose_name_isnt_text_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """W&B's client takes paths as text only."""
    odd = tmp_path / os.fsdecode(b"gr\xf6\xdfe")
    odd.mkdir()
    attempt(odd, 0, range(1, 4), end="done", record=RECORD)
    [said] = own(caplog)
    assert said.startswith("W&B can't be started; going on without it until the next start: ")


def test_odd_and_long_names_are_sent_as_far_as_they_are_text(tmp_path: Path) -> None:
    odd = tmp_path / ("größe 100% = 'a\"b' \N{CJK UNIFIED IDEOGRAPH-732B} " + 180 * "x")
    odd.mkdir()
    tracker = Wandb(
        odd, mode="auto", project="keel", name=odd.name, tags=[], group=odd.name, job_type="pretrain",
        run_id="abcd1234", settings={"data": {"manifest": os.fsdecode(b"gr\xf6\xdfe")}},
        already_sent=0, evaluations=list,
    )  # fmt: skip
    tracker.log({"step": 1, "loss": 1.0})
    tracker.finish("done")
    [run] = [record.run for record in finished(odd) if record.HasField("run")][:1]
    assert run.display_name.startswith("größe 100% = 'a\"b' \N{CJK UNIFIED IDEOGRAPH-732B} xxx")
    assert len(run.display_name) == len(run.run_group) == 128


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("track.project=a/b", "none of"),
        ("track.project=" + 129 * "a", "1 to 128 characters"),
        ("track.tags=['', fine]", "1 to 64"),
        ("track.tags=[" + 65 * "a" + "]", "1 to 64"),
    ],
)
def test_names_that_wandb_wouldnt_take_are_refused_first(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"track\..*{said}"):
        load("smoke/mae", RunConfig, [setting])


def test_without_a_key_it_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_key()
    assert _mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert _mode("auto") == "online"
    assert _mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert _mode("auto") == "disabled"


def test_a_key_of_an_older_client_counts(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    assert has_key()


@pytest.mark.parametrize("host", [[], ["--host=https://wandb.lab.example:8443"]])
def test_after_wandb_login_there_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: list[str]
) -> None:
    """W&B's own command, which knows better than we where it keeps keys and hosts."""
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not has_key()
    login = [str(Path(sys.executable).with_name("wandb")), "login", "--no-verify", *host, "0" * 40]
    subprocess.run(
        login, check=True, capture_output=True, timeout=60, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert has_key()
    assert _mode("auto") == "online"


def test_a_netrc_that_cant_be_read_has_no_key(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_bytes(b"machine \xff\xfe")
    assert not has_key()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `wandb` beside Python that writes down what it is told, and fails where a file says so."""
    home = tmp_path / "bin"
    home.mkdir()
    program = home / "wandb"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" "mode=$WANDB_MODE" > {home}/said\n[ ! -e {home}/broken ]\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(home / "python"))
    return home


def offline(run: Path, day: int, synced: bool = False) -> Path:
    folder = run / "wandb" / f"offline-run-2026110{day}_120000-abcd1234"
    folder.mkdir(parents=True)
    (folder / "run-abcd1234.wandb").touch()
    if synced:
        (folder / "run-abcd1234.wandb.synced").touch()
    return folder


def test_what_is_sent_is_what_waits_oldest_first(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second, first = offline(tmp_path, 2), offline(tmp_path, 1)
    offline(tmp_path, 3, synced=True)
    (tmp_path / "wandb" / "offline-run-20261104_120000-empty").mkdir()
    assert offline_folders(tmp_path) == [first, second]
    with pytest.raises(RunError, match=r"^W&B: no key is here; run `wandb login`"):
        upload([first, second])
    assert not (stand_in / "said").exists()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    upload([first, second])
    assert (stand_in / "said").read_text().split("\n") == ["sync", str(first), str(second), "mode=", ""]
    (stand_in / "broken").touch()
    with pytest.raises(RunError, match=r"`wandb sync` failed \(exit code 1\)"):
        upload([first])


def test_attempts_kept_offline_become_one_run_without_a_gap_or_a_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's real command against a server that remembers lines; once more, and nothing is left to send."""
    attempt(tmp_path, 0, range(1, 4))
    finished(tmp_path)
    attempt(tmp_path, 3, range(2, 6), end="done")
    finished(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with server() as received:
        monkeypatch.setenv("WANDB_BASE_URL", received.url)
        upload(offline_folders(tmp_path))
        [(run, rows)] = received.history.items()
    assert run == "abcd1234"
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["train/loss"] for row in rows] == [1 / step for step in range(1, 6)]
    said = received.said[run]
    assert (said["groupName"], said["jobType"], said["tags"]) == ("a-sweep", "pretrain", ["a"])
    assert "mine: done" in received.alerts
    assert any(name.startswith("media/images/pictures/rebuilt") for name in received.files)
    assert offline_folders(tmp_path) == []
