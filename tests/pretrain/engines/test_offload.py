"""Masters and moments in host memory: the same training, the same checkpoints, the same refusal of NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Ranks
from tests.pretrain.engines.test_blocks import agree
from tests.pretrain.engines.test_blocks import run as run_towers
from tests.pretrain.engines.test_deepspeed import poisoned, resumed, run, saved


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_is_the_same(ranks: Ranks, stage: int) -> None:
    """AdamW, clipping, a teacher and assigned parameters, over two micro-batches."""
    options = {"accumulation": 2, "gradient_clip": 0.05}
    plain = ranks(2, run, stage=1, **options)
    for (losses, state), (same, same_state) in zip(
        plain, ranks(2, run, stage=stage, offload_optimizer=True, **options), strict=True
    ):
        assert same == pytest.approx(losses, rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(same_state[name], value, rtol=1e-4, atol=2e-6)


def test_with_activation_checkpointing(ranks: Ranks) -> None:
    cut = {"stage": 2, "accumulation": 2, "gradient_clip": 0.5, "kind": "sync"}
    both = ranks(2, run_towers, offload_optimizer=True, activation_checkpointing=True, **cut)
    agree(ranks(2, run_towers, **cut), both)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_update_with_nan_changes_nothing(ranks: Ranks, stage: int, precision: str) -> None:
    found = ranks(2, poisoned, stage=stage, precision=precision, offload_optimizer=True)
    for skipped, before, after, ratio, goes_on in found:
        assert skipped and before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
        assert ratio == (0.5 if precision == "fp16" else 1.0)
        assert all(loss == loss for loss in goes_on)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_go_over(ranks: Ranks, tmp_path: Path, stage: int, before: bool, after: bool) -> None:
    straight = ranks(2, saved, stage=stage, directory=tmp_path / "c", offload_optimizer=before)
    again = ranks(2, resumed, stage=stage, directory=tmp_path / "c", offload_optimizer=after)
    for (losses, state), (same_losses, same_state) in zip(straight, again, strict=True):
        assert same_losses == pytest.approx(losses, rel=1e-6)
        for name in state:
            assert torch.equal(state[name], same_state[name]), name
