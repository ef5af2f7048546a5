"""LARS against its formula, the schedule of weight decay, and what ZeRO can't have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from pretrain.clock import Progress
from pretrain.objective import ParamGroup
from pretrain.optimizers import LARS, OptimizerConfig
from tests.pretrain.run.test_main import Ranks, config_for, run_on


def test_lars_is_its_formula() -> None:
    """Three steps in NumPy float64: a matrix is scaled and decays, a vector does neither."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
    optimizer = OptimizerConfig(name="lars", lr=0.5, weight_decay=0.1, trust=0.01, momentum=0.8).make(
        [ParamGroup([("matrix", matrix), ("vector", vector)])]
    )
    w, v = matrix.detach().double().numpy().copy(), vector.detach().double().numpy().copy()
    mw, mv = np.zeros_like(w), np.zeros_like(v)
    for step in range(3):
        gradients = np.random.default_rng(step).standard_normal((3, 4)), np.full(4, 0.3 * step)
        matrix.grad, vector.grad = (torch.tensor(g, dtype=torch.float32) for g in gradients)
        optimizer.step()
        d = gradients[0] + 0.1 * w
        mw = 0.8 * mw + 0.01 * np.linalg.norm(w) / np.linalg.norm(d) * d
        mv = 0.8 * mv + gradients[1]
        w, v = w - 0.5 * mw, v - 0.5 * mv
        np.testing.assert_allclose(matrix.detach().numpy(), w, rtol=1e-5)
        np.testing.assert_allclose(vector.detach().numpy(), v, rtol=1e-5)


def test_lars_takes_a_layer_of_zeros_and_a_gradient_of_zeros() -> None:
    zeros, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zeros.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zeros, still], lr=0.1, momentum=0.9, weight_decay=0.0, trust=0.001).step()
    torch.testing.assert_close(zeros.detach(), torch.full((2, 2), -0.1))
    assert torch.equal(still.detach(), torch.ones(2, 2))


def test_weight_decay_moves_by_half_a_cosine() -> None:
    config = OptimizerConfig(lr=1.0, weight_decay=0.04, final_weight_decay=0.4)
    schedule = config.schedule_for(batch_size=8, dataset_size=80, total_steps=10)
    got = [schedule(Progress(step, 0, 10, 80)).weight_decay for step in range(11)]
    want = 0.4 - 0.36 * (np.cos(np.pi * np.arange(11) / 10) + 1) / 2
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert got[0] == pytest.approx(0.04) and got[-1] == pytest.approx(0.4)


def test_lars_and_zero_are_refused_in_a_line() -> None:
    lars = OptimizerConfig(name="lars", lr=1.0)
    lars.require_possible(zero_stage=0)
    OptimizerConfig(lr=1.0).require_possible(zero_stage=3)
    with pytest.raises(ConfigError, match=r"train\.zero_stage: found 1, with .*=lars it must be 0"):
        lars.require_possible(zero_stage=1)


def test_a_run_with_lars_resumes_exactly(ranks: Ranks, tmp_path: Path, digits: Path) -> None:
    """Its momentum is part of the state."""
    lars = ("train.duration=4 steps", "optimizer.warmup=0 steps", "optimizer.name=lars", "train.zero_stage=0",
            "optimizer.lr=1.0", "data.workers=0")  # fmt: skip
    straight = run_on(ranks, 1, config_for(tmp_path / "straight", digits, *lars, smoke="moco_v3"))
    stopped = config_for(tmp_path / "cut", digits, *lars, "train.stop_after=2 steps", smoke="moco_v3")
    run_on(ranks, 1, stopped)
    assert run_on(ranks, 1, config_for(tmp_path / "cut", digits, *lars, smoke="moco_v3")) == straight
    assert len(set(straight)) == 4
