"""The state contract: whatever of a run changes while it trains is in its checkpoint, or can't matter."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain.clock import Progress
from pretrain.engines import processes, storage
from pretrain.engines.deepspeed import DeepSpeedEngine, LossScale, initialize
from pretrain.engines.fragments import persistent_buffers
from pretrain.objective import LossOutput, Objective
from pretrain.ports import StepSettings
from tests.conftest import Ranks
from tests.contract.test_objectives import EVERY, batch_for, build
from tests.pretrain.engines.tiny import Tiny, adamw

COUNT = 8
OF_TORCH = frozenset({"training", "_is_full_backward_hook", "_compiled_call_impl"})
"""Attributes of every module that say how it is run, not what it knows."""


def test_the_list_holds_what_it_promises(ranks: Ranks, tmp_path: Path) -> None:
    """One place says what state is; a thing that leaves it without a word fails here."""
    tensors, state = ranks(1, saved_by_tiny, directory=str(tmp_path / "checkpoint"))[0]
    model = {name for name in tensors if name.startswith("model/")}
    assert model == {
        *(f"model/{side}.{layer}.{kind}" for side in ("encoder", "teacher") for layer in (0, 2)
          for kind in ("weight", "bias")),
        "model/scale", "model/queue",
    }  # fmt: skip
    trained = {name for name in model if "teacher" not in name and "queue" not in name}
    moments = {
        name.replace("model/", f"optimizer/{key}/") for key in ("exp_avg", "exp_avg_sq") for name in trained
    }
    assert {name for name in tensors if name.startswith("optimizer/")} == moments
    assert {name for name in tensors if name.startswith("rank/")} == {"rank/0/plain", "rank/0/cpu"}
    assert state["loss_scale"]["value"] == 1024.0 and state["scalars"]["scale"]["step"] == {"tensor": 2.0}
    assert state["extra"] == {"step": 2}


def saved_by_tiny(directory: str) -> tuple[list[str], dict[str, Any]]:
    here = processes.start("cpu")
    engine = engine_around(Tiny(), here)
    engine.loss_scale = LossScale(1024.0)
    batch = [torch.randn(COUNT, 3, 4, 4)]
    for step in range(2):
        advance(engine, engine._objective, batch_of(batch), step)
    engine.save(Path(directory), {"step": 2})
    reader = storage.Reader(Path(directory))
    engine.close()
    processes.stop()
    return reader.tensors, reader.state


def batch_of(views: list[Tensor]) -> Any:
    from data_pipeline.types import Batch

    return Batch(tuple(views), torch.arange(COUNT), torch.arange(COUNT))


def engine_around(objective: Objective, here: processes.Processes) -> DeepSpeedEngine:
    return initialize(objective, adamw, here, micro_batch=COUNT)  # type: ignore[arg-type]


def advance(engine: DeepSpeedEngine, objective: Objective, batch: Any, step: int) -> None:
    progress = Progress(step, step * COUNT, 10, 1000)
    if objective.needs_whole_share:
        with torch.no_grad():
            batch = replace(batch, prepared=objective.before_step(batch, progress))
    output = engine.forward(batch, progress)
    engine.backward(output.loss)
    update = engine.step(StepSettings(lr=1e-3, weight_decay=0.0))
    assert update is not None
    objective.after_step(update, progress.applied(), output)


@pytest.mark.parametrize("name", EVERY)
def test_what_changes_in_training_is_saved(ranks: Ranks, name: str) -> None:
    """Buffers that aren't saved, tensors that aren't registered and plain attributes stay as they were."""
    assert ranks(1, changed_unsaved, name=name) == [[]]


def changed_unsaved(name: str) -> list[str]:
    here = processes.start("cpu")
    objective = build(name)
    return sorted(_changed(objective, batch_for(name, COUNT), here))


def _changed(objective: Objective, batch: Any, here: processes.Processes) -> Iterator[str]:
    engine = engine_around(objective, here)
    advance(engine, objective, batch, 0)  # what is made with the first batch is there
    before = dict(_unsaved(objective))
    for step in range(1, 4):
        advance(engine, objective, batch, step)
    after = dict(_unsaved(objective))
    for key in before.keys() | after.keys():
        if key not in before or key not in after or not _equal(before[key], after[key]):
            yield key
    engine.close()
    processes.stop()


def _unsaved(objective: nn.Module) -> Iterator[tuple[str, Any]]:
    """Copies of all that modules hold and no checkpoint has: by name."""
    saved = {name for name, _ in persistent_buffers(objective)}
    for prefix, module in objective.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name not in saved:
                yield name, buffer.clone()
        for name, value in vars(module).items():
            if name in OF_TORCH or (name.startswith("_") and name in vars(nn.Module())):
                continue
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}", value.clone()
            elif isinstance(value, int | float | str | bool):
                yield f"{prefix}.{name}", value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


class Forgetful(Tiny):
    """Breaks the contract in each way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.loose = torch.zeros(2)
        self.mean: Tensor

    def after_step(self, update: Any, progress: Progress, output: LossOutput) -> None:
        super().after_step(update, progress, output)
        self.count += 1
        self.mean.add_(1)
        self.loose = self.loose + 1


def test_the_check_sees_what_is_forgotten(ranks: Ranks) -> None:
    assert ranks(1, forgotten) == [[".count", ".loose", "mean"]]


def forgotten() -> list[str]:
    here = processes.start("cpu")
    return sorted(_changed(Forgetful(), batch_of([torch.randn(COUNT, 3, 4, 4)]), here))


def test_random_states_come_back(ranks: Ranks, tmp_path: Path) -> None:
    """Of Python, NumPy and torch, each rank its own; on another number of ranks they start anew."""
    drawn = ranks(2, draws, directory=str(tmp_path / "checkpoint"))
    assert all(before == after for before, after in drawn) and drawn[0][0] != drawn[1][0]


def draws(directory: str) -> tuple[list[float], list[float]]:
    here = processes.start("cpu")
    engine = engine_around(Tiny(), here)
    processes.seed(7, per_rank=True)
    torch.rand(5), random.random(), np.random.rand()
    engine.save(Path(directory), {})
    before = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    engine.load(Path(directory))
    after = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    engine.close()
    processes.stop()
    return before, after


def test_who_a_run_is_survives(tmp_path: Path) -> None:
    """Its id, which trackers go by, is in run.json and made once."""
    from pretrain.run.folder import RunFolder

    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.update_state(id="0123abcd", status="new")
    for status in ("running", "stopped"):
        folder.update_state(status=status)
    assert folder.read_state()["id"] == "0123abcd"
