"""Who holds the others up: gathered, written as a table, named once."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from pretrain.clock import Progress
from pretrain.engines import processes
from pretrain.health.stragglers import Stragglers
from pretrain.objective import LossOutput
from pretrain.ports import StepReport, StepSettings
from tests.conftest import Ranks


def report(step: int, seconds: float, busy: float, waited: float) -> StepReport:
    progress = Progress(step, 8 * step, 100, 1000)
    output = LossOutput(torch.zeros(()), {})
    return StepReport(progress, output, None, StepSettings(0, 0), waited, seconds, busy)  # type: ignore[arg-type]


def four_ranks(root: str) -> tuple[list[dict[str, float]], list[str]]:
    """Rank 2 waits for its data; two rows are due."""
    here = processes.start("cpu")
    told: list[dict[str, float]] = []
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pretrain.health.stragglers").addHandler(handler)
    each = Stragglers(2, Path(root), lambda progress, figures: told.append(dict(figures)))
    waited = 0.5 if here.rank == 2 else 0.1
    for step in range(1, 6):
        each.after_step(report(step, 1.0, 0.3 + waited, waited))
    processes.stop()
    return told, said


def test_the_slowest_rank_is_named(ranks: Ranks, tmp_path: Path) -> None:
    (told, said), *others = ranks(4, four_ranks, root=str(tmp_path))
    assert [figures["slowest_rank"] for figures in told] == [2, 2]
    assert abs(told[0]["slowest_busy"] - 0.8) < 1e-6 and abs(told[0]["slowest_data_wait"] - 0.5) < 1e-6
    [line] = said  # once, as long as nothing changes
    assert "median rank takes 0.40 s a step: rank 2 on" in line and "0.80 s (data 0.50 s)" in line
    assert others == [([], [])] * 3
    table: dict[str, Any] = json.loads((tmp_path / "stragglers.json").read_text())
    [(node, rows)] = table["nodes"].items()
    assert node == os.uname().nodename and [row["rank"] for row in rows] == [0, 1, 2, 3]
    assert table["step"] == 4 and abs(rows[2]["busy"] - 0.8) < 1e-6
