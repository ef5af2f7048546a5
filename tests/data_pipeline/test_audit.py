"""The audit counts what a loader really gave."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.audit import audit
from data_pipeline.bench import throughput
from data_pipeline.config import DataConfig
from data_pipeline.facts import make_plan
from data_pipeline.load import build_loader
from data_pipeline.manifest import Manifest
from data_pipeline.quarantine import quarantined
from data_pipeline.types import CenterCrop, ViewSpec
from tests.data_pipeline.sets import numbered_set, sample, write_set


@pytest.mark.parametrize("stopped", [1, 7, 13])
def test_it_counts_what_was_loaded(tmp_path: Path, stopped: int) -> None:
    numbered_set(tmp_path / "a", [20, 11])
    write_set(tmp_path / "b", [[sample(0), {"png": b"broken"}, sample(1)]])
    values = {
        "manifest": tmp_path / "a",
        "also": [{"manifest": tmp_path / "b", "weight": 0.25}],
        "workers": 0,
    }
    config, given = DataConfig.model_validate(values), list[int]()
    view = [ViewSpec((4, 4), CenterCrop(1.0), flip=0)]
    for world, start, steps in ((1, 0, stopped), (2, 8 * stopped, 5)):
        for rank in range(world):
            with build_loader(
                config, view, needs=frozenset({"views"}), seed=9, batch_size=8, rank=rank, world_size=world,
                position=start, quarantine=tmp_path / "q.jsonl",
            ) as batches:  # fmt: skip
                for _ in range(steps):
                    given += next(batches).index.tolist()
                counted = batches.metrics()
    consumed = 8 * (stopped + 5)
    plan = make_plan(config, [Manifest.load(tmp_path / name) for name in "ab"], seed=9)
    first, second = audit(plan, ["a", "b"], consumed, quarantined(tmp_path / "q.jsonl"))
    seen = Counter("a" if index < 31 else "b" for index in given)
    assert (first.seen, second.seen) == (seen["a"], seen["b"]) and first.seen + second.seen == consumed
    assert (first.seen, second.seen) == (counted["source_0_samples"], counted["source_1_samples"])
    assert first.unique == len({index for index in given if index < 31}) and first.substituted == 0
    assert first.repeated == first.seen - first.unique and first.epochs == first.seen / 31
    drawn = plan.draws(np.arange(consumed)).index
    assert second.substituted == (drawn == 32).sum() and 32 not in given
    assert second.unique == len({index for index in drawn.tolist() if index >= 31})


def test_the_bench_measures(tmp_path: Path) -> None:
    numbered_set(tmp_path, [30])
    found = throughput(tmp_path, size=16, batch_size=8, workers=0, seconds=0.2)
    assert found.samples >= 8 and found.seconds >= 0.2 and found.samples_per_second > 0 and found.cpu_ms > 0
