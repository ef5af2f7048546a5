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

from pretrain.folder import write_atomically

FILE = "nodes.json"
BROKEN = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "NOT_RESPONDING"}
FAILURES = 2
"""A node that failed under a run this often is avoided by it."""


def bad(root: Path, hosts: Sequence[str]) -> list[str]:
    """Note a start on `hosts`, blame the start before if a node ended it; gives those of `hosts` to avoid."""
    path = root / FILE
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"starts": [], "failures": {}}
    if record["starts"] and not _ended_well(root, record["starts"][-1]):
        for name in _failed(record["starts"][-1]):
            record["failures"][name] = record["failures"].get(name, 0) + 1
    start = {"hosts": list(hosts), "time": time.time(), "job": os.environ.get("SLURM_JOB_ID")}
    record["starts"].append(start)
    write_atomically(path, json.dumps(record, indent=1))
    return [name for name in hosts if record["failures"].get(name, 0) >= FAILURES]


def _ended_well(root: Path, start: dict[str, Any]) -> bool:
    """Whether the attempt made by `start` came to its own end."""
    try:
        attempts = json.loads((root / "run.json").read_text()).get("attempts", [])
    except FileNotFoundError:
        return True
    return bool(attempts) and bool(attempts[-1].get("ended"))


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
