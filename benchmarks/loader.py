"""The loader against its installed peers: interleaved rounds, medians, ratios.

    python benchmarks/loader.py [--rounds N] [--seconds S] [--data DIR] [--peers DIR] [--out FILE.md]

Input: JPEGs of about 390 x 360 and 56 kB; output: RandomResizedCrop 224 and flip as uint8 batches of 64, two
workers. CPU time counts the whole tree of processes, which is what a busy machine can't distort as it does
wall time. `--peers`: a folder with mosaicml-streaming and its imports, where it isn't installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.loader_peers import BATCH, CONTESTANTS, SIZE, WORKERS, make_data  # noqa: E402
from benchmarks.loader_table import table  # noqa: E402


@dataclass(frozen=True)
class Measured:
    """Warm throughput of one contestant."""

    samples: int
    wall: float  # seconds
    cpu: float  # seconds, all processes

    @property
    def cpu_ms(self) -> float:
        return self.cpu / self.samples * 1e3


def tree_cpu() -> float:
    """CPU seconds of this process and all below it."""
    total, waiting = 0.0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except FileNotFoundError:
            continue
        total += sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return total


def measured(batches: Iterator[int], seconds: float, warm: int = 8) -> Measured:
    """Pull batches (their lengths) for a while after `warm` of them."""
    for _ in range(warm):
        next(batches)
    samples, cpu, started = 0, tree_cpu(), time.perf_counter()
    while time.perf_counter() - started < seconds:
        samples += next(batches)
    return Measured(samples, time.perf_counter() - started, tree_cpu() - cpu)


def resume_seconds(folder: Path, share: float) -> float:
    """From building the loader to the first batch, `share` of an epoch into the data."""
    from data_pipeline.bench import throughput
    from data_pipeline.manifest import Manifest

    position = int(Manifest.load(folder / "tar").samples * share)
    found = throughput(
        folder / "tar", size=SIZE, batch_size=BATCH, workers=WORKERS, seconds=0.05, position=position
    )
    return found.first_batch


def order_at_scale() -> dict[str, float]:
    """Cold seek into the middle of 2e9 samples in 200,000 shards."""
    import tracemalloc

    import numpy as np

    from data_pipeline.order import Order

    sizes = np.full(200_000, 10_000)
    started = time.perf_counter()
    Order(sizes, seed=5).take(np.arange(1_234_567_891, 1_234_567_891 + 4096))
    seconds = time.perf_counter() - started
    tracemalloc.start()
    Order(sizes, seed=5).take(np.arange(1_234_567_891, 1_234_567_891 + 4096))
    peak = tracemalloc.get_traced_memory()[1]
    return {"seconds": seconds, "megabytes": peak / 1e6}


def in_process(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one measurement here and give it as JSON values."""
    if name == "order":
        return order_at_scale()
    if name.startswith("resume "):
        return {"seconds": resume_seconds(folder, float(name.split()[1]))}
    return asdict(measured(CONTESTANTS[name](folder), seconds))


def in_child(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run one measurement in a fresh process; None where it fails, with a word about it."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--data", str(folder)]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), options.peers]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seconds", str(options.seconds)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        print(f"{name}: left out: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        return None
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> int:
    """Measure everything in interleaved rounds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--data", default="")
    parser.add_argument("--peers", default="")
    parser.add_argument("--one", default="")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(in_process(options.one, Path(options.data), options.seconds)), flush=True)
        os._exit(0)  # peers' workers would be waited for
    if options.peers:
        sys.path.append(options.peers)
    folder = Path(options.data) if options.data else Path(tempfile.mkdtemp(prefix="keel-bench-"))
    try:
        if not (folder / "tar" / "manifest.json").exists():
            make_data(folder, options.samples)
        names = [*CONTESTANTS, "resume 0.01", "resume 0.9", "order"]
        rounds = [{name: in_child(name, folder, options) for name in names} for _ in range(options.rounds)]
    finally:
        if not options.data:
            shutil.rmtree(folder, ignore_errors=True)
    text = table(rounds)
    print(text)
    if options.out:
        Path(options.out).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
