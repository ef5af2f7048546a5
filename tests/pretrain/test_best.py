"""Which of two figures is better, where one of them is none."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import best, checkpoint
from pretrain.best import KeepBest
from pretrain.checkpoint import CheckpointConfig
from pretrain.evaluators.knn import KNNConfig


@pytest.mark.parametrize("figures", list(itertools.permutations([50.0, math.nan, 70.0, math.nan])))
@pytest.mark.parametrize(("which", "wanted"), [("highest", 70.0), ("lowest", 50.0)])
def test_a_nan_is_never_the_best_whenever_it_comes(
    figures: tuple[float, ...], which: Any, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(checkpoint, "pins", lambda run: pinned)
    monkeypatch.setattr(checkpoint, "pin", lambda run, why, name, **facts: pinned.update({why: facts}))
    config = CheckpointConfig(best="knn/top1", best_is=which)
    saver: Any = SimpleNamespace()
    keep = KeepBest(config, [KNNConfig(data=Path("x"))], Path("run"), saver, (1, 1))
    for figure in figures:
        keep.pin("step-1", figure)
    assert pinned[keep.reason]["value"] == wanted


def test_a_nan_that_an_older_version_has_pinned_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best.checkpoint, "pins", lambda run: {"best knn/top1": {"value": math.nan}})
    config = CheckpointConfig(best="knn/top1", best_is="highest")
    saver: Any = SimpleNamespace()
    assert KeepBest(config, [KNNConfig(data=Path("x"))], Path("run"), saver, (1, 1))._better(0.1)
