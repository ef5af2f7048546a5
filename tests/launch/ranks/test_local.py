"""The launcher of local ranks, with ranks that are small scripts: a case takes a fraction of a second."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.loading import dump, load
from launch.ranks import local
from launch.ranks.local import supervise
from pretrain.config import RunConfig, RunSection
from pretrain.run.folder import RunFolder
from tests.waiting import wait_for

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from launch.ranks.job import LAUNCHER, MEANING, die_with
die_with(int(os.environ[LAUNCHER]))
rank, here = int(os.environ["RANK"]), Path(__file__).parent
logs = here / "logs"; logs.mkdir(exist_ok=True)
log = (logs / f"rank-{rank:05d}.log").open("a", buffering=1)
asked = []
for number in MEANING:
    signal.signal(number, lambda n, f: asked.append(n))
signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANING)
(here / f"pid{rank}.part").write_text(str(os.getpid()))
(here / f"pid{rank}.part").rename(here / f"pid{rank}")
def sleep_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
"""

Start = Callable[..., subprocess.Popen[str]]


def rank_script(tmp_path: Path, body: str) -> list[str]:
    script = tmp_path / "rank.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    return [sys.executable, str(script)]


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE", 0.3)


def run(tmp_path: Path, body: str, nproc: int = 2) -> int:
    return supervise(rank_script(tmp_path, body), nproc, tmp_path / "logs", {"SHARED": "yes"})


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run the launcher itself as a process; gives it once every rank stands."""
    started: list[subprocess.Popen[str]] = []

    def begin(body: str, nproc: int = 2) -> subprocess.Popen[str]:
        command = rank_script(tmp_path, body)
        code = (
            "import signal, sys; from pathlib import Path; from launch.ranks.local import supervise;"
            "signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # these tests may themselves run under nohup
            f"sys.exit(supervise({command!r}, {nproc}, Path({str(tmp_path / 'logs')!r}), {{}}))"
        )
        launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        started.append(launcher)
        wait_for(f"{nproc} ranks to stand", lambda: len(list(tmp_path.glob("pid?"))) == nproc)
        return launcher

    yield begin
    for launcher in started:
        launcher.kill()
        launcher.communicate()


def pids(tmp_path: Path) -> list[int]:
    return [int(path.read_text()) for path in tmp_path.glob("pid?")]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_get_their_environment(tmp_path: Path) -> None:
    body = """
    (here / f"env{rank}").write_text(" ".join(os.environ[n] for n in ("RANK", "LOCAL_RANK", "SHARED")))
    """
    assert run(tmp_path, body) == 0
    assert [(tmp_path / f"env{rank}").read_text() for rank in range(2)] == ["0 0 yes", "1 1 yes"]


def test_stopped_is_not_a_failure_and_nobody_is_hurried(tmp_path: Path) -> None:
    body = """
    if rank == 0:
        time.sleep(0.5)
        (here / "finished").write_text("")
    sys.exit(3)
    """
    assert run(tmp_path, body) == 3
    assert (tmp_path / "finished").exists()


def test_a_signal_after_all_ranks_have_saved_changes_nothing(tmp_path: Path) -> None:
    command = rank_script(tmp_path, "sys.exit(3)")
    code = (
        "import os, signal, sys; from pathlib import Path; from launch.ranks.local import supervised\n"
        f"code, _ = supervised({command!r}, 2, Path({str(tmp_path / 'logs')!r}), {{}}, True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(code)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3


def test_one_dead_rank_ends_the_others_and_its_log_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
    if rank == 1:
        print("the last words", file=log)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    began = time.monotonic()
    assert run(tmp_path, body) == 1
    assert time.monotonic() - began < 30
    shown = capfd.readouterr().err
    assert "the last words" in shown
    assert "rank 1 failed first (killed by SIGKILL, perhaps for lack of memory)" in shown
    assert str(tmp_path / "logs" / "rank-00001.log") in shown
    assert not any(map(alive, pids(tmp_path)))


def test_the_first_failure_is_named_not_its_echo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 2:
        os._exit(1)
    while not (here / "pid2").exists():
        time.sleep(0.01)
    time.sleep(2)
    os._exit(1)
    """
    assert run(tmp_path, body, nproc=3) == 1
    assert "rank 2 failed first (exit code 1)" in capfd.readouterr().err


def test_bad_input_in_a_rank_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 1:
        print("noise", file=log)
        print("error: shard-3.tar: is cut short", file=log)
        os._exit(2)
    time.sleep(60)
    """
    assert run(tmp_path, body) == 2
    assert capfd.readouterr().err == "error: shard-3.tar: is cut short\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, start: Start, number: int) -> None:
    launcher = start(
        """
        sleep_until(lambda: asked)
        time.sleep(0.2)  # a second copy would come now
        (here / f"asked{rank}").write_text(repr([int(n) for n in asked]))
        sys.exit(3)
        """
    )
    launcher.send_signal(number)
    assert launcher.wait(60) == 3
    assert [(tmp_path / f"asked{rank}").read_text() for rank in range(2)] == [f"[{int(number)}]"] * 2


def test_a_signal_before_a_rank_listens_is_kept_for_it(tmp_path: Path) -> None:
    early = tmp_path / "early.py"
    early.write_text(
        "import os, signal\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"  # deadly, were it not blocked from the first instant
        "os._exit(0 if signal.SIGTERM in signal.sigpending() else 1)\n"
    )
    assert supervise([sys.executable, str(early)], 2, tmp_path, {}) == 0


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, start: Start) -> None:
    launcher = start("sleep_until(lambda: asked, 60); (here / f'asked{rank}').touch(); time.sleep(60)")
    launcher.send_signal(signal.SIGINT)
    wait_for("both ranks to hear the first one", lambda: len(list(tmp_path.glob("asked?"))) == 2)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 130
    assert not any(map(alive, pids(tmp_path)))


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path, start: Start) -> None:
    launcher = start("time.sleep(60)")
    assert all(map(alive, pids(tmp_path)))
    launcher.kill()
    launcher.wait()
    wait_for("the end of every rank", lambda: not any(map(alive, pids(tmp_path))))


def test_what_a_rank_left_running_is_ended(tmp_path: Path) -> None:
    body = """
    child = os.fork()
    if child == 0:
        time.sleep(60)
    (here / f"pid{rank + 5}").write_text(str(child))
    """
    assert run(tmp_path, body) == 0
    wait_for("the end of every rank", lambda: not any(map(alive, pids(tmp_path))))
    assert len(pids(tmp_path)) == 4


def test_the_launcher_gets_its_signal_handlers_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    run(tmp_path, "")
    assert before == (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ()))


@pytest.mark.parametrize(
    ("end", "again"),
    [("os.kill(os.getpid(), signal.SIGKILL)", True), ("os._exit(5)", True), ("os._exit(1)", False)],
    ids=["killed", "hung", "failed"],
)
def test_only_what_may_go_well_next_time_is_started_again(tmp_path: Path, end: str, again: bool) -> None:
    command = rank_script(tmp_path, f"if rank == 1: {end}\ntime.sleep(60)")
    assert local.supervised(command, 2, tmp_path / "logs", {}) == (1, again)


def test_who_was_asked_to_leave_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "if rank == 0: os.kill(os.getppid(), signal.SIGTERM)\nsleep_until(lambda: asked)\nos._exit(5)"
    assert local.supervised(rank_script(tmp_path, body), 2, tmp_path / "logs", {}) == (1, False)


@pytest.mark.parametrize(("failures", "code", "starts"), [(2, 0, 3), (9, 1, 4)])
def test_restarts_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, code: int, starts: int
) -> None:
    folder = RunFolder(tmp_path)
    settings = [f"run.dir={tmp_path}", "train.health.restarts=3"]
    folder.config_file.write_text(dump(load("smoke/mae", RunConfig, settings)))
    begun: list[int] = []

    def once(folder: RunFolder, nproc: int, run: RunSection, last: bool) -> tuple[int, bool]:
        begun.append(nproc)
        return (1, True) if len(begun) <= failures else (0, False)

    monkeypatch.setattr(local, "_once", once)
    assert local.launch(folder, 2) == code
    assert begun == [2] * starts
