"""A thread in every rank that notices when training stands still, says where, and ends the process.

A step is measured from the wait for its batch to the end of its update. What listeners do after it (saving,
evaluating) doesn't count, and the first steps, in which things are compiled, have as long as a collective.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from pretrain.health.health import HealthConfig
from pretrain.ports import BEYOND_STEPS

WARM_UP = 5
"""Steps of an attempt before their median means anything."""


class Watchdog:
    """Of one rank. `enter` is told every phase; `hung` is called with a message from the watching thread.

    `first_steps`: how long each of the first steps may take. Without `config.hang` nobody watches.
    """

    def __init__(
        self,
        config: HealthConfig,
        hung: Callable[[str], None],
        *,
        first_steps: timedelta,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.hung, self.clock = config, hung, clock
        self.first_steps = first_steps.total_seconds()
        self.durations = deque[float](maxlen=64)
        self.phase, self.since = BEYOND_STEPS, clock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.config.hang is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def enter(self, phase: str) -> None:
        """What this rank does from now on."""
        now = self.clock()
        if phase == BEYOND_STEPS:
            self.durations.append(now - self.since)
        if BEYOND_STEPS in (phase, self.phase):
            self.since = now
        self.phase = phase

    @property
    def limit(self) -> float:
        """Seconds a step may take at present."""
        assert self.config.hang is not None
        if len(self.durations) < WARM_UP:
            return max(self.first_steps, self.config.hang_at_least)
        return max(self.config.hang * statistics.median(self.durations), self.config.hang_at_least)

    def check(self) -> None:
        """Calls `hung` where a step has taken too long."""
        phase, stood = self.phase, self.clock() - self.since
        if phase != BEYOND_STEPS and stood > (limit := self.limit):
            self.hung(f"no step for {stood:.0f} s (allowed: {limit:.0f} s); this rank is in: {phase}")

    def _watch(self) -> None:
        every = min(5.0, self.config.hang_at_least / 4)
        while not self._end.wait(every):
            self.check()


def dump(message: str, nccl_trace: Path) -> None:
    """Write `message` and the stacks of all threads to standard error; on CUDA NCCL's records to a file."""
    os.write(2, f"{message}\n".encode())
    faulthandler.dump_traceback(file=2, all_threads=True)
    if torch.cuda.is_available():
        from torch._C import _distributed_c10d

        trace = getattr(_distributed_c10d, "_dump_nccl_trace_json", None)
        if trace is not None:
            nccl_trace.write_bytes(trace())
            os.write(2, f"what NCCL was doing: {nccl_trace}\n".encode())
