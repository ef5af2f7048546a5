"""Process state: alone, together, seeded, quiet at the end; the memory estimate against real tensors."""

from __future__ import annotations

import logging
import os
import random
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pretrain.engines import processes
from tests.conftest import Ranks
from tests.pretrain.engines.tiny import engine_of, train


def alone() -> tuple[int, int, str, bool]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    here = processes.start()
    real = dist.is_initialized() and dist.get_backend() == "gloo"
    processes.stop()
    return here.rank, here.world_size, here.device.type, real


def test_without_a_launcher_one_rank_has_a_real_process_group(ranks: Ranks) -> None:
    assert ranks(1, alone) == [(0, 1, "cpu", True)]


def draws() -> tuple[list[float], list[float]]:
    processes.start("cpu")

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    processes.seed(2**31 - 1)
    same = draw()
    processes.seed(5, per_rank=True)
    return same, draw()


def test_seeds_are_the_same_on_all_ranks_unless_asked(ranks: Ranks) -> None:
    (same, own), (same_too, other) = ranks(2, draws)
    assert same == same_too
    assert all(a != b for a, b in zip(own, other, strict=True))


def without_a_warning(stage: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine, objective, _ = engine_of(stage)
        train(engine, objective, 0, 1)
        engine.close()
        processes.stop()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_whole_life_without_a_warning(ranks: Ranks, stage: int) -> None:
    ranks(2, without_a_warning, stage=stage)


def speak() -> list[str]:
    here = processes.start("cpu")
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage().removeprefix(f"[RANK {here.rank}] "))

    logging.getLogger("keel.test").addHandler(Ear())
    log = processes.logger("keel.test")
    log.warning("to all from %d", here.rank)
    log.warning("each from %d", here.rank, main_process_only=False)
    processes.stop()
    return heard


def test_the_logger_speaks_on_rank_0_unless_told(ranks: Ranks) -> None:
    assert ranks(2, speak) == [["to all from 0", "each from 0"], ["each from 1"]]


def build() -> nn.Module:
    module = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(10, 10, bias=False))
    module[1].requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    [(0, 4.0004, 4, 8), (1, 4.0004, 4, 3), (2, 4.0004, 1, 3), (3, 1.0001, 1, 3)],
)
def test_memory_estimate_in_megabytes_at_four_ranks(
    stage: int, parameters: float, gradients: float, optimizer: float
) -> None:
    found = processes.memory_estimate(build, stage, world_size=4)
    assert (found.parameters, found.gradients, found.optimizer) == (
        parameters * 1e6,
        gradients * 1e6,
        optimizer * 1e6,
    )
    assert found.total == round((parameters + gradients + optimizer) * 1e6)
