"""One rank: `python -m launch.ranks.job RUN`, with RANK, WORLD_SIZE and the rest in the environment.

Exit codes: 0 done, 2 the user's input, 3 stopped early with a valid checkpoint, 1 our fault, 4 lost a peer,
5 hung: see `pretrain.health.watchdog`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from configs.errors import UserError, fault_of_place
from launch.ranks.logs import rank_log, redirected, speaking
from launch.runs.early_stop import watching
from launch.runs.files import is_echo

if TYPE_CHECKING:
    from pretrain.health.stopping import StopRequest
    from pretrain.ports import StopReason

DONE, OUR_FAULT, USERS_INPUT, STOPPED = 0, 1, 2, 3
LOST_PEER = 4
"""A rank's code where it ended because another one did. No command ends with it."""
HUNG = 5
"""A rank's code where it found itself standing still, and left so that the launcher can start again."""
LAUNCHER = "KEEL_LAUNCHER"
"""Environment variable with the launcher's process id, without which a rank wouldn't want to live."""

MEANING: Mapping[signal.Signals, StopReason] = {
    signal.SIGINT: "interrupted",
    signal.SIGHUP: "interrupted",  # the terminal is gone
    signal.SIGTERM: "terminated",
    signal.SIGUSR2: "preempted",  # to come back: a SLURM job requeues itself (launch/slurm/task.py)
}
"""What a signal asks of a run. All of them end it with a checkpoint."""


class Outcome(NamedTuple):
    """What a rank came to."""

    code: int
    reason: StopReason | None = None  # why training ended, where it did so with a checkpoint


def hang_up() -> NoReturn:
    """End this process at once, from whatever thread: nothing in it can be trusted to end by itself."""
    os._exit(HUNG)


def job(root: Path, hung: Callable[[], object] = hang_up, *, last: bool = False) -> Outcome:
    """Train the prepared run in `root` as the rank that the environment names.

    `hung` is called from another thread where training stands still, after the log was told; it ends the
    process. `last`: nothing comes after it in this process, so that signals that come late change nothing.
    """
    rank = int(os.environ.get("RANK", "0"))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # what NCCL did last, to be told when it hangs
    # A lost peer aborts this process rather than leaving it in a collective: its launcher runs all again.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    with redirected(rank_log(root / "logs", rank), show=rank == 0) as console:
        try:
            from pretrain.health.stopping import StopRequest
            from pretrain.run.folder import RunFolder
            from pretrain.run.main import train

            with (
                speaking(),
                stack_dumps(),
                listening(StopRequest(), last) as stop,
                watching(root, stop, rank),
            ):
                # Without a terminal, progress lines go the way of all output: log first, then console.
                shown = console if console and console.isatty() else sys.stderr
                reason = train(RunFolder(root), stop, shown, abort=hung)
            return Outcome(DONE if reason == "done" else STOPPED, reason)
        except UserError as error:
            print(as_lines(error), file=sys.stderr)
            return Outcome(USERS_INPUT)
        except Exception as error:
            if lost_a_peer(error):
                print(f"rank {rank}: another rank is gone, so this one leaves too", file=sys.stderr)
                return Outcome(LOST_PEER)
            if isinstance(error, OSError) and (known := fault_of_place(error)) is not None:
                print(as_lines(known), file=sys.stderr)
                print("then the same command goes on from the newest checkpoint", file=sys.stderr)
                return Outcome(USERS_INPUT)
            traceback.print_exc()
            return Outcome(OUR_FAULT)


def lost_a_peer(error: Exception) -> bool:
    """Whether the error is an echo: the failure of another rank, seen as a broken connection."""
    return is_echo(str(error))


def as_lines(error: UserError) -> str:
    """A user's error as it is printed, each problem on a line of its own."""
    return "\n".join(f"error: {line}" for line in str(error).splitlines())


@contextmanager
def listening(stop: StopRequest, last: bool = False) -> Iterator[StopRequest]:
    """Meanwhile signals only set the flag of `stop`. A second Ctrl-C ends the process at once.

    Where it ends well and was the `last` thing that the process does, signals are ignored from then on: all
    is saved, and one that comes while Python shuts down must not make a failure of it.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.reason == "interrupted":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        name, again = signal.Signals(number).name, "; Ctrl-C again leaves at once"
        os.write(2, f"{name}: saving, then leaving{again if number == signal.SIGINT else ''}\n".encode())
        stop.ask(MEANING[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in MEANING}
    for number in MEANING:
        if before[number] is not signal.SIG_IGN:  # nohup
            signal.signal(number, ask)
    # A launcher starts ranks with these blocked, so that none is lost or deadly before someone listens.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANING)
    try:
        yield stop
    except BaseException:
        last = False
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)


@contextmanager
def stack_dumps() -> Iterator[None]:
    """Meanwhile a crash, or SIGUSR1 where a run seems to hang, writes every thread's stack to the log."""
    enabled = faulthandler.is_enabled()
    if not enabled:
        faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        if not enabled:
            faulthandler.disable()


def die_with(launcher: int) -> None:
    """Have the kernel kill this process when its parent `launcher` dies, however that dies."""
    set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    if ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != launcher:  # it died before the kernel was told
        os._exit(OUR_FAULT)


def main() -> None:
    if launcher := os.environ.get(LAUNCHER):
        die_with(int(launcher))
    try:
        code = job(Path(sys.argv[1]), last=True).code
    except OSError as error:  # its log can't be made
        if (known := fault_of_place(error)) is None:
            raise
        print(as_lines(known), file=sys.stderr, flush=True)
        code = USERS_INPUT
    if code in (DONE, STOPPED):
        sys.exit(code)
    # A failed rank leaves without waiting for threads or peers: its launcher sees at once who was first.
    os._exit(code)


if __name__ == "__main__":
    main()
