"""A rank's manners: signals set a flag, errors are lines, exit codes say what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from launch.ranks.job import MEANING, as_lines, job, listening, lost_a_peer
from pretrain.health.stopping import StopRequest
from pretrain.run import main


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[..., Any]], int]:
    """Call `job` with `train` replaced by a function of the stop request."""

    def call(body: Callable[[StopRequest], Any]) -> int:
        monkeypatch.setattr(main, "train", lambda folder, stop, console, **outside: body(stop))
        return job(tmp_path).code

    return call


@pytest.mark.parametrize("number", MEANING)
def test_signals_set_the_flag(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # these tests may themselves run under nohup
    try:
        with listening(StopRequest()) as stop:
            os.kill(os.getpid(), number)
            assert stop.reason == MEANING[number]
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_hang_up_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(StopRequest()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_kills() -> None:
    code = (
        "import os, signal\n"
        "from launch.ranks.job import listening; from pretrain.health.stopping import StopRequest\n"
        "with listening(StopRequest()) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGINT


LATE = """
import atexit, os, signal, sys
from launch.ranks import job
from pretrain.run import main as run
run.train = lambda folder, stop, console, **outside: "terminated"
sys.argv = ["job", sys.argv[1]]
done = job.job

def told(number, *given, **more):
    outcome = done(*given, **more)
    os.kill(os.getpid(), number)
    return outcome

for number in job.MEANING:
    signal.signal(number, signal.SIG_DFL)
for number in job.MEANING:
    for late in ("as soon as training is over", "while Python shuts down"):
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(signal.Signals(number).name, late, code, flush=True)
            continue
        if late.startswith("as"):
            job.job = lambda *given, **more: told(number, *given, **more)
        else:
            atexit.register(os.kill, os.getpid(), number)
        job.main()
"""


def test_a_signal_that_comes_when_all_is_saved_changes_nothing(tmp_path: Path) -> None:
    """As the second SIGTERM of a scheduler that repeats itself."""
    command = [sys.executable, "-c", LATE, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 2 * len(MEANING) and all(line.endswith(" 3") for line in said), said


def test_a_run_that_something_follows_gives_the_signals_back(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with listening(StopRequest()):
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with suppress(ValueError), listening(StopRequest(), last=True):
            raise ValueError  # a failure may be interrupted
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with listening(StopRequest(), last=True):
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for number in MEANING:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.signal(signal.SIGTERM, before)


def test_nccl_aborts_a_rank_that_has_lost_a_peer(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    assert train(lambda stop: "done") == 0
    assert os.environ.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "3"


def test_exit_codes(train: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def bad_data(stop: StopRequest) -> str:
        raise DataError("shard-3.tar: is cut short\nshard-4.tar: too")

    def our_fault(stop: StopRequest) -> str:
        raise RuntimeError("we did this")

    assert train(lambda stop: "done") == 0
    assert train(lambda stop: "interrupted") == 3
    assert capfd.readouterr().err == ""
    assert train(bad_data) == 2
    assert capfd.readouterr().err == "error: shard-3.tar: is cut short\nerror: shard-4.tar: too\n"
    assert train(our_fault) == 1
    shown = capfd.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("RuntimeError: we did this\n")
    assert "we did this" in (tmp_path / "logs" / "rank-00000.log").read_text()


def test_a_signal_while_training_reaches_the_loop(train: Callable[..., int]) -> None:
    def interrupted(stop: StopRequest) -> str | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return stop.reason

    assert train(interrupted) == 3


def test_a_hanging_run_can_be_asked_where(train: Callable[..., int], tmp_path: Path) -> None:
    def hanging(stop: StopRequest) -> str:
        os.kill(os.getpid(), signal.SIGUSR1)
        return "done"

    assert train(hanging) == 0
    assert "in hanging" in (tmp_path / "logs" / "rank-00000.log").read_text()


def test_every_line_of_an_error_is_marked() -> None:
    assert as_lines(DataError("a\nb")) == "error: a\nerror: b"


def test_the_echo_of_another_ranks_failure_is_no_fault_of_this_one() -> None:
    assert lost_a_peer(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:20368. GLHF!"))
    assert lost_a_peer(RuntimeError("[/gloo/transport/tcp/pair.cc:72]\nwritev [10.0.0.1]:9: Broken pipe"))
    nccl = (
        "remote process exited or there was a network error\nncclRemoteError: A call failed possibly due to"
    )
    assert lost_a_peer(RuntimeError(nccl))
    assert not lost_a_peer(RuntimeError("shapes differ"))
    assert not lost_a_peer(BrokenPipeError(32, "Broken pipe"))  # of whatever else the run talks to
