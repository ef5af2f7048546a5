"""Time to the first step after a resume, at 1 % and at 90 % of an epoch: skipped data cost nothing.

    python benchmarks/resume_time.py [--samples 24000] [--repeats 5]

A tiny MAE trains on the demo's shapes, really up to both places. Each resume is a process of its own: counted
from the call of `prepare` (imports left out) until the first row of metrics is written: checks
of config, data and checkpoint, model, engine, loader, the first batch and its step. Medians, the two places
in turn. Fails where 90 % takes more than 1.2 times what 1 % takes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from configs.loading import load
from pretrain.config import RunConfig
from pretrain.health.stopping import StopRequest
from pretrain.run.main import prepare, train

BOUND, BATCH = 1.2, 100


def settings(run: Path, data: Path, samples: int, steps: int) -> list[str]:
    """One epoch's run that leaves after `steps` more steps."""
    return [
        f"run.dir={run}", f"data.manifest={data}/train/manifest.json", "data.demo.name=shapes",
        f"data.demo.samples={samples}", "data.demo.val_samples=100", "train.duration=1 epochs",
        f"train.batch_size={BATCH}", f"train.stop_after={steps} steps", "checkpoint.every=100000 steps",
        "checkpoint.keep=100",
    ]  # fmt: skip


def attempt(overrides: list[str]) -> float:
    """Seconds until this attempt's first row of metrics; it runs to its end."""
    config = load("configs/smoke/mae.yaml", RunConfig, overrides)
    metrics = config.run.dir / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    found: list[float] = []

    def watch() -> None:
        while not found:
            if metrics.exists() and metrics.stat().st_size > before:
                found.append(time.perf_counter())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    train(prepare(config, world_size=1), StopRequest())
    watcher.join()
    return found[0] - started


def in_a_process(overrides: list[str]) -> float:
    command = [sys.executable, __file__, "--attempt", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> int:
    """Measure and print; 1 where the ratio is above the bound."""
    parser = argparse.ArgumentParser(description="time to the first step after a resume")
    parser.add_argument("--samples", type=int, default=24_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attempt", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.attempt:
        print(attempt(chosen.attempt))
        return 0
    epoch = chosen.samples // BATCH
    first, late = max(epoch // 100, 1), epoch * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        data, early_run, late_run = (Path(folder) / name for name in ("data/shapes", "early", "late"))
        in_a_process(settings(early_run, data, chosen.samples, first))
        shutil.copytree(early_run, late_run)
        in_a_process(settings(late_run, data, chosen.samples, late - first))
        seconds: dict[Path, list[float]] = {early_run: [], late_run: []}
        for _ in range(chosen.repeats):
            for run, taken in seconds.items():
                taken.append(in_a_process(settings(run, data, chosen.samples, 1)))
    medians = []
    for place, taken in zip(("1 %", "90 %"), seconds.values(), strict=True):
        medians.append(statistics.median(taken))
        print(f"{place} of an epoch of {chosen.samples}: {', '.join(f'{s:.2f}' for s in taken)} s; ", end="")
        print(f"median {medians[-1]:.2f} s")
    ratio = medians[1] / medians[0]
    print(f"ratio {ratio:.2f}, bound {BOUND}: {'held' if ratio <= BOUND else 'NOT held'}")
    return 0 if ratio <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
