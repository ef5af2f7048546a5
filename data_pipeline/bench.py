"""How fast a machine loads a set: `keel data bench`."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.cache import CacheConfig
from data_pipeline.config import DataConfig
from data_pipeline.load import build_loader
from data_pipeline.types import RandomResizedCrop, ViewSpec


@dataclass(frozen=True)
class Throughput:
    """One measurement of a loader, workers warm."""

    samples: int
    seconds: float
    cpu_ms: float  # CPU time of all processes, per sample
    first_batch: float  # seconds from building the loader

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds


def throughput(
    manifest: Path,
    *,
    size: int,
    batch_size: int,
    workers: int,
    seconds: float,
    position: int = 0,
    cache: CacheConfig | None = None,
) -> Throughput:
    """Load batches of one random-crop view for `seconds`. `cache`: as `data.cache`. Raises `UserError`."""
    view = ViewSpec((size, size), RandomResizedCrop())
    config = DataConfig(manifest=manifest, image_size=size, workers=workers, cache=cache)
    built = time.perf_counter()
    with build_loader(
        config, [view], needs=frozenset({"views"}), seed=0, batch_size=batch_size, rank=0, world_size=1,
        position=position,
    ) as batches:  # fmt: skip
        next(batches)
        first = time.perf_counter() - built
        for _ in range(config.prefetch):  # what was made ahead while nobody counted
            next(batches)
        pids = [os.getpid(), *batches.worker_pids()]
        samples, cpu, started = 0, sum(map(_cpu, pids)), time.perf_counter()
        while time.perf_counter() - started < seconds:
            samples += len(next(batches))
        elapsed = time.perf_counter() - started
        used = sum(map(_cpu, pids)) - cpu
    return Throughput(samples, elapsed, used / samples * 1e3, first)


def _cpu(pid: int) -> float:
    """CPU seconds of a process so far."""
    if pid == os.getpid():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
