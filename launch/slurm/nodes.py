"""Nodes that fail under a run: RUN/nodes.json, kept by rank 0 of each start on SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically
from launch.runs.files import read_json
from launch.runs.shapes import Row, count, number, run_state

FILE = "nodes.json"
BROKEN = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "NOT_RESPONDING"}
FAILURES = 2
"""A node that failed under a run this often is avoided by it."""


def bad(root: Path, hosts: Sequence[str]) -> list[str]:
    """Note a start on `hosts`, blame the start before if a node ended it; gives those of `hosts` to avoid."""
    path, cluster = root / FILE, os.environ.get("SLURM_CLUSTER_NAME", "")
    starts, failures = _recorded(path, cluster)
    attempts = _attempts(root)
    if starts and not _ended_well(attempts, starts[-1]):
        for name in _failed(starts[-1]):
            failures[name] = failures.get(name, 0) + 1
    start = {
        "hosts": list(hosts), "time": time.time(), "job": os.environ.get("SLURM_JOB_ID"),
        "attempts": len(attempts),
    }  # fmt: skip
    record = {"cluster": cluster, "starts": [*starts, start], "failures": failures}
    write_atomically(path, json.dumps(record, indent=1))
    return [name for name in hosts if failures.get(name, 0) >= FAILURES]


def _recorded(path: Path, cluster: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Starts and failures so far; none where the file is torn, or of another cluster's nodes."""
    found = read_json(path)
    starts, failures = found.get("starts"), found.get("failures")
    if not isinstance(starts, list) or not isinstance(failures, dict):
        return [], {}
    if found.get("cluster", cluster) != cluster:
        return [], {}
    known = [start for start in starts if isinstance(start, dict) and _usable(start)]
    return known, {name: number for name, number in failures.items() if count(number) is not None}


def _usable(start: dict[str, Any]) -> bool:
    hosts = start.get("hosts")
    return number(start.get("time")) is not None and (
        isinstance(hosts, list) and all(isinstance(host, str) for host in hosts)
    )


def _attempts(root: Path) -> Sequence[Row]:
    """Those that the run knows of."""
    found: Sequence[Row] = run_state(read_json(root / "run.json"))[0].get("attempts") or []
    return found


def _ended_well(attempts: Sequence[Row], start: dict[str, Any]) -> bool:
    """Whether the attempt made by `start` came to its own end; one that came to none was ended before."""
    made = attempts[count(start.get("attempts")) or 0 :]
    return bool(made) and bool(made[-1].get("ended"))


def _failed(start: dict[str, Any]) -> list[str]:
    """The nodes of `start` that SLURM holds for broken, or that were booted since."""
    try:
        told = subprocess.run(
            ["scontrol", "show", "node", "-o", ",".join(start["hosts"])],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for name, state, booted in _parsed(told) if BROKEN & state or booted > start["time"]]


def _parsed(told: str) -> Iterator[tuple[str, set[str], float]]:
    """Name, words of the state and time of boot of each line of `scontrol show node -o`."""
    for line in told.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        try:
            booted = datetime.fromisoformat(fields.get("BootTime", "")).timestamp()
        except ValueError:  # None, Unknown
            booted = 0.0
        yield fields["NodeName"], set(fields["State"].replace("*", "+NOT_RESPONDING").split("+")), booted
