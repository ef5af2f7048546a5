"""DESIGN's resume table, row by row: how a run is computed may change, what it computes may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.loading import difference, load
from pretrain.config import RunConfig, refused_changes

MAY_CHANGE = {
    "workers": "data.workers=3",
    "read ahead": "data.prefetch=5",
    "threads": "run.threads=2",
    "micro-batch": "train.micro_batch_size=8",
    "ZeRO stage": "train.zero_stage=3",
    "recomputing": "train.activation_checkpointing=true",
    "offload": "train.offload=optimizer",
    "compiling": "train.compile=blocks",
    "cadence of saving": "checkpoint.every=7 min",
    "what is kept": "checkpoint.keep=9",
    "cadence of evaluating": "evaluate=[{kind: effective_rank, data: somewhere, every: 9 steps}]",
    "cadence of tracking": "track.every=9 steps",
    "stop_after": "train.stop_after=3 steps",
    "time limit": "train.time_limit=90 min",
    "health": "train.health.then=roll_back",
    "place of the data": "data.manifest=/elsewhere/manifest.json",  # their content is compared apart
}
REFUSED = {
    "batch size": "train.batch_size=64",
    "duration": "train.duration=30 steps",
    "seed": "run.seed=7",
    "optimizer": "optimizer.weight_decay=0.1",
    "learning rate": "optimizer.lr=1e-4",
    "schedule": "optimizer.schedule=constant",
    "warm-up": "optimizer.warmup=5 steps",
    "precision": "train.precision=bf16",
    "gradient clipping": "train.gradient_clip=1.0",
    "objective": "objective.mask_ratio=0.75",
    "encoder": "encoder.args.depth=3",
    "image size": "data.image_size=24",
    "streams": "data.streams=3",
    "window": "data.window=17",
}


def changed(override: str) -> dict[str, tuple[object, object]]:
    before = load("smoke/mae", RunConfig, ["run.dir=/runs/a"])
    return difference(before, load("smoke/mae", RunConfig, ["run.dir=/runs/b", override]))


@pytest.mark.parametrize("row", MAY_CHANGE)
def test_how_may_change(row: str) -> None:
    found = changed(MAY_CHANGE[row])
    assert len(found) > 1, "the override changes nothing"
    assert refused_changes(found) == {}


@pytest.mark.parametrize("row", REFUSED)
def test_what_may_not(row: str) -> None:
    assert list(refused_changes(changed(REFUSED[row]))) == [REFUSED[row].partition("=")[0]]


def test_every_setting_is_in_one_of_the_two(tmp_path: Path) -> None:
    """A new setting is refused until somebody has thought about it."""
    config = load("smoke/mae", RunConfig, [f"run.dir={tmp_path}"])
    assert refused_changes({"train.brand_new": (1, 2)}) == {"train.brand_new": (1, 2)}
    assert refused_changes({"checkpoint.every": (1, 2)}) == {}
    assert set(config.model_dump()) >= {"run", "data", "objective", "encoder", "optimizer", "train"}
