"""A run folder as a run would have left it: three attempts, one killed, a NaN, evaluations, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Row = dict[str, Any]


def run_folder(
    root: Path,
    *,
    steps: int = 400,
    batch: int = 32,
    lr: float = 1e-3,
    pictures: tuple[str, ...] = ("reconstructions", "attention"),
    change: Callable[[Row], Row] = lambda row: row,
) -> Path:
    """Write the folder; `change` may alter each row of metrics before it is written."""
    root.mkdir(parents=True)
    config = {
        "run": {"dir": str(root), "seed": 0}, "objective": {"name": "mae", "mask_ratio": 0.75},
        "encoder": {"name": "vit_tiny_patch16_224"}, "optimizer": {"lr": lr, "betas": [0.9, 0.95]},
    }  # fmt: skip
    (root / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    rows, clock = [], 1_800_000_000.0
    third = steps // 3
    for step in range(1, steps + 1):
        attempt = 1 + (step > third) + (step > 2 * third)
        clock += 3600 if step in (third + 1, 2 * third + 1) else 1.0
        loss = 0.3 + math.exp(-step / 60) + 0.02 * math.sin(step * 1.7)
        row = {
            "attempt": attempt, "step": step, "samples": step * batch, "epoch": step / 50, "loss": loss,
            "lr": lr * min(1, step / 40), "weight_decay": 0.05, "grad_norm": 1 + 0.5 * math.cos(step),
            "samples_per_second": 40.0, "data_wait": 0.1, "seconds": 0.8, "time": clock,
            "objective/top1": float(step),
        }  # fmt: skip
        rows.append(change(row))
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moments = [row["time"] for row in rows]
    attempts = [
        {"attempt": 1, "from_step": 0, "started": iso(moments[0]), "world_size": 2, "zero_stage": 1,
         "ended": iso(moments[third - 1]), "reason": "preempted"},
        {"attempt": 2, "from_step": third, "started": iso(moments[third]), "world_size": 2, "zero_stage": 1},
        {"attempt": 3, "from_step": 2 * third, "started": iso(moments[2 * third]), "world_size": 1,
         "zero_stage": 1, "ended": iso(moments[-1]), "reason": "done"},
    ]  # fmt: skip
    state = {
        "id": "abcd1234", "status": "done", "step": steps, "samples": steps * batch, "total_steps": steps,
        "commit": "0123456789abcdef", "attempts": attempts,
    }  # fmt: skip
    (root / "run.json").write_text(json.dumps(state))
    scores = [
        {"step": step, "samples": step * batch, "name": "knn", "values": {"top1": 20 + step / 10}}
        for step in range(steps // 4, steps + 1, steps // 4)
    ]
    (root / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for name in pictures:
        for step in (steps // 2, steps):
            pixels = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / f"step-{step:08d}-{name}.png")
    return root


def iso(moment: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
