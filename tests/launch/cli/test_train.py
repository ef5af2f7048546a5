"""The command line as a user meets it: quick help, one line for a mistake, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import demo
from data_pipeline.demo import DemoConfig
from pretrain.export import timm_folder
from tests.waiting import wait_for

Said = tuple[int, str, str]


@pytest.fixture(scope="module")
def digits(digits: Path) -> Path:
    """The manifest to train on."""
    return digits / "train" / "manifest.json"


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def processes_of(run: Path) -> list[int]:
    """Every live process that names the run in its command or was started by one that does."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# ---- help and usage --------------------------------------------------------------------------


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys, time; from launch.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(set(sys.modules) & {'torch', 'numpy', 'timm', 'deepspeed', 'wandb', 'PIL'}))"
    )
    began = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.rstrip().endswith("[]")
    assert time.monotonic() - began < 10  # 0.3 s on a machine with nothing else to do


def test_the_module_is_the_command(keel: Callable[..., Said]) -> None:
    module = subprocess.run([sys.executable, "-m", "launch", "--help"], capture_output=True, text=True)
    assert module.returncode == 0
    for command in ("train", "evaluate", "export", "demo", "data"):
        assert re.search(rf"^ +{command} ", module.stdout, re.MULTILINE)
        assert keel(command, "--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "demo/mae", "--nproc", "0"], "Invalid value for '--nproc'"),
        (["export", "runs/x"], "Missing option '--to'"),
    ],
)
def test_wrong_usage_is_the_users_input(
    keel: Callable[..., Said], arguments: list[str], message: str
) -> None:
    code, _, err = keel(*arguments)
    assert code == 2
    assert message in err


# ---- bad input -------------------------------------------------------------------------------


def a_line_each(said: Said, *parts: str) -> None:
    code, out, err = said
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == len(parts)
    for line, part in zip(lines, parts, strict=True):
        assert line.startswith("error: ")
        assert part in line


def test_forks_and_replays_of_nothing(keel: Callable[..., Said], tmp_path: Path) -> None:
    a_line_each(keel("train", "smoke/mae", "--step", 3), "--step and --anew belong to --fork RUN")
    a_line_each(keel("train", "smoke/mae", "--anew"), "--step and --anew belong to --fork RUN")
    a_line_each(keel("replay", tmp_path, "--step", 3), f"{tmp_path}: not a run folder")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["train.batchsize=64"], "train.batchsize: no such setting; did you mean batch_size?"),
        (["train.batch_size=many"], "train.batch_size: found 'many'; "),
        (["train.batch_size=33"], "train.batch_size: 33 can't be shared equally by 2 ranks"),
        (["objective.name=mea"], "objective"),
        (["nonsense"], "nonsense: an override reads path.to.setting=value"),
        (["data.manifest=/nowhere/manifest.json", "data.demo=null"], "/nowhere/manifest.json"),
    ],
)
def test_a_bad_setting_is_one_line(
    keel: Callable[..., Said], tmp_path: Path, digits: Path, settings: list[str], part: str
) -> None:
    run = tmp_path / "run"
    base = [f"run.dir={run}", f"data.manifest={digits}"]
    a_line_each(keel("train", "smoke/mae", "--nproc", 2, *base, *settings), part)
    assert not run.exists()


def test_every_bad_setting_is_named_at_once(keel: Callable[..., Said], tmp_path: Path) -> None:
    said = keel("train", "smoke/mae", f"run.dir={tmp_path / 'run'}", "train.batch_size=-1", "run.seed=x")
    a_line_each(said, "run.seed", "train.batch_size")


def test_a_missing_config_names_the_nearest(keel: Callable[..., Said]) -> None:
    a_line_each(
        keel("train", "smoke/mea"), "smoke/mea: no such config file; did you mean configs/smoke/mae.yaml?"
    )


def test_an_export_is_what_was_asked_for(
    keel: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def made(run: Path, to: Path, **how: Any) -> timm_folder.ExportResult:
        asked.append(how)
        return timm_folder.ExportResult(to, "resnet50", 23_508_032, 2e-7)

    monkeypatch.setattr(timm_folder, "export", made)
    options = ("--weights", "teacher", "--format", "hf", "--step", 7, "--licence", "mit")
    code, out, _ = keel("export", tmp_path, "--to", tmp_path / "out", *options)
    assert code == 0 and "from a hub's cache in a fresh process: largest difference 2.0e-07" in out
    assert asked == [{"step": 7, "weights": "teacher", "form": "hf", "force": False, "licence": "mit"}]
    pair = keel("export", tmp_path, "--to", tmp_path / "out", "--weights", "ema", "--format", "open_clip")
    a_line_each(pair, "--weights: found ema; open_clip's pair has one: model")
    code, _, err = keel("export", tmp_path, "--to", tmp_path / "out", "--weights", "students")
    assert code == 2 and "'model', 'ema', 'teacher'" in err


def test_a_folder_that_is_no_run_is_one_line(keel: Callable[..., Said], tmp_path: Path) -> None:
    a_line_each(keel("export", tmp_path, "--to", tmp_path / "out"), f"{tmp_path}: not a run folder")
    a_line_each(keel("evaluate", tmp_path), f"{tmp_path}: has no evaluations of its own")
    assert list(tmp_path.iterdir()) == []


def test_our_own_mistake_keeps_its_traceback(
    keel: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("pretrain.run.main.prepare", broken)
    code, _, err = keel("train", "smoke/mae", f"run.dir={tmp_path / 'run'}")
    assert code == 1
    assert err.startswith("Traceback")
    assert "ZeroDivisionError: ours" in err


def test_a_damaged_shard_is_one_line_from_whichever_rank_meets_it(tmp_path: Path) -> None:
    demo.make(DemoConfig(name="digits"), tmp_path / "digits")
    for shard in (tmp_path / "digits" / "train").glob("*.tar"):
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)
    manifest = tmp_path / "digits" / "train" / "manifest.json"
    ended = start(
        "train", "smoke/mae", f"run.dir={tmp_path / 'run'}", f"data.manifest={manifest}", "--nproc", 2
    )
    said, _ = ended.communicate(timeout=240)
    assert ended.returncode == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert ".tar" in errors[0]
    assert "Traceback" not in said


# ---- stopping --------------------------------------------------------------------------------

LONG = ("train.duration=400 steps", "checkpoint.every=1000 steps", "data.workers=1")


@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_saves_and_leaves_cleanly(tmp_path: Path, digits: Path, nproc: int) -> None:
    """A terminal's Ctrl-C goes to the whole foreground group: data workers too, where they are in it."""
    run = tmp_path / "run"
    command = ["train", "smoke/mae", "--nproc", nproc, f"run.dir={run}", f"data.manifest={digits}", *LONG]
    first = start(*command, start_new_session=True)
    wait_for("five rows of metrics", lambda: len(rows(run)) >= 5 or first.poll() is not None)
    os.killpg(first.pid, signal.SIGINT)
    said, _ = first.communicate(timeout=240)
    assert first.returncode == 3, said
    assert "Traceback" not in said
    left = rows(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{left:08d}-a01"]
    assert json.loads((run / "run.json").read_text())["attempts"][0]["reason"] == "interrupted"
    assert not processes_of(run)


def test_nothing_outlives_a_killed_launcher(tmp_path: Path, digits: Path) -> None:
    """Neither ranks nor their data workers, which are killed with nobody left to tell them to end."""
    run = tmp_path / "run"
    launcher = start(
        "train", "smoke/mae", "--nproc", 2, f"run.dir={run}", f"data.manifest={digits}", *LONG,
        env=os.environ | {"KEEL_TEST_RUN": str(run)},
    )  # fmt: skip
    wait_for("three rows of metrics", lambda: len(rows(run)) >= 3 or launcher.poll() is not None)
    marked = processes_with_environment(f"KEEL_TEST_RUN={run}")
    assert len(marked) >= 5, "a launcher, two ranks, two data workers"
    launcher.kill()
    launcher.communicate()
    wait_for(
        "the end of all that was started", lambda: not processes_with_environment(f"KEEL_TEST_RUN={run}")
    )


def test_a_killed_rank_does_not_end_the_run(tmp_path: Path, digits: Path) -> None:
    """Its launcher starts all ranks again, from the newest checkpoint."""
    run = tmp_path / "run"
    launcher = start(
        "train", "smoke/mae", "--nproc", 2, f"run.dir={run}", f"data.manifest={digits}", "data.workers=0",
        "checkpoint.every=50 steps", "train.duration=400 steps",
    )  # fmt: skip
    wait_for("a checkpoint", lambda: any((run / "checkpoints").glob("step-*")) or launcher.poll() is not None)
    log = (run / "logs" / "rank-00001.log").read_text()
    told = re.search(r"rank 1 of 2, process (\d+) on", log)
    assert told is not None, log
    os.kill(int(told[1]), signal.SIGKILL)
    said, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, said
    assert "rank 1 failed first (killed by SIGKILL" in said
    assert "starting again from the newest checkpoint; 2 restarts are left" in said
    assert [row["step"] for row in rows(run)] == list(range(1, 401))
    assert {row["attempt"] for row in rows(run)} == {1, 2}


def processes_with_environment(setting: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = b") Z " not in (entry / "stat").read_bytes()
            if alive and setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# ---- what is shown ---------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_and_the_log_gets_everything(tmp_path: Path, digits: Path) -> None:
    ours, theirs = pty.openpty()
    run = tmp_path / "run"
    command = ["train", "smoke/mae", "--nproc", "2", f"run.dir={run}", f"data.manifest={digits}"]
    training = subprocess.Popen([sys.executable, "-m", "launch", *command], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert training.wait(120) == 0, shown.decode()
    assert re.search(rb"24/24 +loss \d\.\d{4} +lr .* samples/s +data wait \d+%", shown)
    assert b"\x1b[2K" in shown  # lines and bar share the screen
    assert b"done; run folder: " in shown
    logs = [(run / "logs" / f"rank-0000{rank}.log").read_text() for rank in range(2)]
    assert "rank 0 of 2" in logs[0] and "parameters" in logs[0]
    assert "rank 1 of 2" in logs[1]
