"""Eighteen runs as people have them: a sweep, another objective, one diverged, one killed, one just begun."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.pretrain.report.told import Row, run_folder

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def _objective(root: Path, name: str, **settings: Any) -> None:
    config = json.loads((root / "config.yaml").read_text())
    config["objective"] = {"name": name, **settings}
    (root / "config.yaml").write_text(json.dumps(config))


def _state(root: Path, **changes: Any) -> None:
    state = json.loads((root / "run.json").read_text()) | changes
    (root / "run.json").write_text(json.dumps(state))


def eighteen(root: Path) -> list[Path]:
    """Folders named as a sweep names them."""
    runs = []
    for number, lr in enumerate(RATES * 2):
        seed = number // len(RATES)

        def slower(row: Row, lr: float = lr, number: int = number) -> Row:
            step = row["step"]
            loss = 0.4 + 0.1 * number / 10 + math.exp(-step * (3 + math.log10(lr) / 2) / 90)
            return row | {
                "loss": loss + 0.05 * math.sin(step * 1.7),
                "samples_per_second": 40 + number + step % 7,
            }

        name = f"smoke-mae-lr={lr:g},seed={seed}-{number:08x}"
        runs.append(run_folder(root / "sweep" / name, steps=120, lr=lr, change=slower, pictures=()))

    def higher(row: Row) -> Row:
        return row | {"loss": 20 * row["loss"]}

    for number in range(4):
        name = f"smoke-clip-temperature={0.01 * (number + 1):g}-{90 + number:08x}"
        run = run_folder(root / "sweep" / name, steps=90, change=higher, pictures=())
        _objective(run, "clip", temperature=0.01 * (number + 1))
        runs.append(run)

    def diverged(row: Row) -> Row:
        ill = row["step"] > 30
        return row | {"loss": None if ill else row["loss"], "grad_norm": None if ill else 1e12 * row["step"]}

    name = "smoke-mae-lr=1e+20,seed=0-feedbeef"
    ill = run_folder(root / "sweep" / name, steps=60, lr=2.5e19, change=diverged, pictures=())
    nothing = '{"step": 60, "samples": 1920, "name": "knn", "values": {"top1": null}}\n'
    (ill / "evaluations.jsonl").write_text(nothing)
    _state(
        ill,
        status="failed",
        step=1,
        samples=32,
        total_steps=120,
        error="error: 8 losses in a row aren't finite",
    )
    killed = run_folder(root / "sweep" / "smoke-mae-lr=0.03,seed=0-0badc0de", steps=45, lr=0.03, pictures=())
    _state(killed, status="running", total_steps=120)
    begun = root / "sweep" / "smoke-mae-lr=0.1,seed=0-00000000"
    begun.mkdir()
    (begun / "config.yaml").write_text((killed / "config.yaml").read_text().replace("0.03", "0.1"))
    pictured = run_folder(root / "sweep" / "smoke-mae-lr=0.02,seed=0-11111111", steps=90, lr=0.02,
                          pictures=("similarities", "attention"))  # fmt: skip
    words = {"similarities": ["红色的圆", "un cercle rouge à l'œuf", "🐈 on a \U0001f6b2", "دائرة حمراء"]}
    row = {"step": 90, "samples": 2880, "name": "pictures", "values": {}, "details": {"captions": words}}
    with (pictured / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    (root / "sweep" / "sweep.json").write_text("{}")
    (root / "sweep" / "submissions").mkdir()
    return [*runs, ill, killed, begun, pictured]
