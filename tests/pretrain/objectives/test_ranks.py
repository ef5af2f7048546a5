"""Every objective on real ranks: the same losses however a global batch is cut, under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.test_run import Ranks, config_for, digits, run_on

__all__ = ["digits"]

STEPS = ("train.duration=4 steps", "optimizer.warmup=0 steps", "data.workers=0", "train.batch_size=32")
CUTS = {
    "2 ranks": (2, ("train.zero_stage=0",)),
    "4 ranks, stage 1": (4, ("train.zero_stage=1",)),
    "accumulate 4, stage 2": (1, ("train.micro_batch_size=8", "train.zero_stage=2")),
    "2 ranks x accumulate 2, stage 3": (2, ("train.micro_batch_size=8", "train.zero_stage=3")),
}


@pytest.mark.parametrize("name", ["moco"])
def test_the_cut_of_a_batch_does_not_matter(ranks: Ranks, tmp_path: Path, digits: Path, name: str) -> None:
    alone = run_on(ranks, 1, config_for(tmp_path / "alone", digits, *STEPS, "train.zero_stage=0", smoke=name))
    for cut, (count, overrides) in CUTS.items():
        config = config_for(tmp_path / cut.replace(" ", "-"), digits, *STEPS, *overrides, smoke=name)
        assert run_on(ranks, count, config) == pytest.approx(alone, rel=1e-4), cut
