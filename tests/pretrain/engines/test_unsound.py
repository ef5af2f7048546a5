"""A loss that isn't finite refuses its update on every rank, also where its gradient is finite."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.clock import Progress
from pretrain.engines import processes
from tests.conftest import Ranks
from tests.pretrain.engines.tiny import BATCH_SIZE, SETTINGS, batch_at, engine_of


def updates(stage: int) -> list[bool]:
    """Whether each of four steps was applied; at the second one rank 1's loss alone is infinite."""
    engine, objective, here = engine_of(stage)
    applied = []
    for step in range(4):
        progress = Progress(step, step * BATCH_SIZE, 100, 1000)
        share = list(batch_at(step).split(BATCH_SIZE // here.world_size))[here.rank]
        before = [p.detach().clone() for p in objective.parameters()]
        loss = engine.forward(share, progress).loss
        engine.backward(loss + (math.inf if (step, here.rank) == (1, 1) else 0.0))
        update = engine.step(SETTINGS)
        applied.append(update is not None)
        assert update is None or update.grad_norm.isfinite()
        same = all(torch.equal(old, p) for old, p in zip(before, objective.parameters(), strict=True))
        assert same == (update is None)
    engine.close()
    processes.stop()
    return applied


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_infinite_loss_is_not_trained_on(ranks: Ranks, stage: int) -> None:
    assert ranks(2, updates, stage=stage) == [[True, False, True, True]] * 2
