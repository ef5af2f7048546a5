"""Schedules against the formula of the papers, written out again."""

from __future__ import annotations

import numpy as np
import pytest

from configs.errors import ConfigError
from pretrain.clock import Duration, Progress
from pretrain.optimizers import OptimizerConfig
from pretrain.schedules import warmup_then


def test_warmup_then_half_cosine() -> None:
    total, warmup, peak, final = 50, 10, 0.3, 0.01
    got = [warmup_then("cosine", k, total, warmup, peak, final) for k in range(total)]
    k = np.arange(total)
    cosine = final + (peak - final) / 2 * (1 + np.cos(np.pi * (k - warmup) / (total - warmup)))
    np.testing.assert_allclose(got, np.where(k < warmup, peak * k / warmup, cosine), rtol=1e-12)
    assert got[0] == 0 and got[warmup] == peak


def test_a_warmup_may_begin_above_zero() -> None:
    """open_clip's: step k of w at (k + 1) / w, so that the last step of it has the peak already."""
    rates = [warmup_then("cosine", k, 50, 10, 0.3, first="one") for k in range(11)]
    np.testing.assert_allclose(rates, [*(0.03 * (np.arange(10) + 1)), 0.3], rtol=1e-12)
    config = OptimizerConfig.model_validate({"lr": 1.0, "warmup": "4 steps", "warmup_from": "one"})
    schedule = config.schedule_for(batch_size=8, dataset_size=80, total_steps=10)
    assert [schedule(Progress(k, 0, 10, 80)).lr for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_without_warmup_it_starts_at_the_peak() -> None:
    assert warmup_then("cosine", 0, 10, 0, 0.5) == 0.5
    assert warmup_then("constant", 9, 10, 3, 0.5) == 0.5
    assert warmup_then("cosine", 10, 10, 10, 0.5) == 0.5


def test_linear_scaling_is_stated() -> None:
    config = OptimizerConfig(base_lr=1.5e-4)
    assert config.peak_lr(4096) == pytest.approx(2.4e-3)
    assert config.stated(4096) == "lr = 0.00015 x 4096 / 256 = 0.0024"
    assert OptimizerConfig(lr=0.1).peak_lr(4096) == 0.1


def test_the_schedule_follows_applied_steps() -> None:
    config = OptimizerConfig(lr=1.0, warmup=Duration(4, "steps"))
    schedule = config.schedule_for(batch_size=8, dataset_size=80, total_steps=10)
    settings = schedule(Progress(step=2, samples=999, total_steps=10, dataset_size=80))
    assert settings.lr == 0.5 and settings.weight_decay == 0.05


def test_bad_settings_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.warmup: 5 epochs is 50 steps"):
        OptimizerConfig(lr=1.0, warmup=Duration(5, "epochs")).schedule_for(8, 80, 10)
    with pytest.raises(ValueError, match="exactly one of base_lr"):
        OptimizerConfig()


def test_the_step_schedule_drops_at_its_milestones() -> None:
    config = OptimizerConfig(
        lr=1.0, schedule="step", milestones=(Duration(3, "steps"), Duration(1, "epochs")), drop=0.1
    )
    schedule = config.schedule_for(batch_size=8, dataset_size=40, total_steps=8)
    rates = [schedule(Progress(step, 8 * step, 8, 40)).lr for step in range(8)]
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])
    for wrong in ({"schedule": "step"}, {"milestones": ("3 steps",)}):
        with pytest.raises(ValueError, match="milestones"):
            OptimizerConfig.model_validate({"lr": 1.0} | wrong)
