"""How long `keel runs` takes over 2,000 run folders, beside bare stat and read of the same files.

    python benchmarks/registry.py [RUNS]

Folders are made in a temporary place with what a finished run leaves: 2,000 rows of metrics, 20 evaluations.
The files have just been written, so they come from memory in both measurements: the ratio is the registry's
own cost. Aim: under 3 s for the whole command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.runs.registry import list_runs

AIM = 3.0
"""Seconds for the command, start of Python included."""

TAIL = 16_384


def make_run(
    root: Path,
    *,
    run: Mapping[str, Any],
    job: Mapping[str, Any] | None = None,
    objective: str = "mae",
    rows: int = 2,
    evaluations: Mapping[int, Mapping[str, float]] | None = None,
) -> None:
    """A run folder as training leaves it. `evaluations`: step to values of an evaluation named knn."""
    (root / "checkpoints").mkdir(parents=True)
    (root / "logs").mkdir()
    (root / "config.yaml").write_text(
        f"run:\n  dir: {root}\nobjective:\n  crop: [0, 1]\n  name: {objective}\nencoder:\n  name: vit\n"
    )
    (root / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    if job is not None:
        (root / "slurm.json").write_text(json.dumps(job))
    row = {
        "attempt": 1, "epoch": 0.5, "lr": 1e-3, "weight_decay": 0.05, "grad_norm": 1.25, "data_wait": 0.001,
        "samples_per_second": 640.0, "seconds": 0.05, "time": 1.8e9, "objective/mask": 0.75,
    }  # fmt: skip
    lines = [row | {"step": n, "samples": 32 * n, "loss": 1 / n} for n in range(1, rows + 1)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = [
        {"step": step, "samples": 32 * step, "name": "knn", "values": dict(values), "details": {"k": 20}}
        for step, values in (evaluations or {}).items()
    ]
    (root / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in judged))


def state(**changes: Any) -> dict[str, Any]:
    """run.json of a run that is done, changed as asked."""
    attempt = {"attempt": 1, "from_step": 0, "world_size": 8, "zero_stage": 1, "reason": "done"}
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "id": "0a1b2c3d", "created": moment, "status": "done", "manifest_hash": "f" * 64, "total_steps": 2000,
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "timm": "1.0.31"}, "python": "3.11.7",
        "host": "node1", "commit": "c" * 40, "heartbeat": moment, "step": 2000, "samples": 64_000,
        "attempts": [attempt | {"started": moment, "ended": moment}],
    } | changes  # fmt: skip


def bare(root: Path, runs: int) -> float:
    """Seconds to stat every file that the registry reads, and to read as much of it."""
    began = time.perf_counter()
    for number in range(runs):
        for name in ("config.yaml", "run.json", "metrics.jsonl", "evaluations.jsonl"):
            path = root / f"run-{number:05d}" / name
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, size - TAIL))
                file.read(TAIL)
    return time.perf_counter() - began


def main(runs: int) -> int:
    """Print the figures; gives 1 where the aim is missed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(runs):
            scores = {100 * n: {"top1": 50.0 + n + number % 7} for n in range(1, 21)}
            make_run(root / f"run-{number:05d}", run=state(), rows=2000, evaluations=scores)
        floor = min(bare(root, runs) for _ in range(3))
        listed = []
        for _ in range(3):
            began = time.perf_counter()
            assert len(list_runs(root)) == runs
            listed.append(time.perf_counter() - began)
        began = time.perf_counter()
        command = [sys.executable, "-m", "launch", "runs", folder, "--json"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True)
        whole = time.perf_counter() - began
        assert len(json.loads(shown.stdout)) == runs
    own = min(listed)
    print(
        f"{runs} run folders: listed in {own:.2f} s, {own / floor:.1f} x bare stat and read ({floor:.2f} s)"
    )
    print(f"keel runs --json, start of Python included: {whole:.2f} s; aim: {AIM:.0f} s")
    return int(whole > AIM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
