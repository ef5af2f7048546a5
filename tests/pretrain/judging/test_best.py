"""Which of two figures is better, where one of them is none."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import ConfigError
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointConfig
from pretrain.evaluators.few_shot import FewShotConfig
from pretrain.evaluators.heldout import HeldOutConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.evaluators.pictures import PicturesConfig
from pretrain.judging import best
from pretrain.judging.best import KeepBest


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


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("knn/top2", "checkpoint.best: found knn/top2, but knn has no figure top2; it has: top1, top5"),
        ("shots/top1_at_2", "found shots/top1_at_2, .* it has: top1_at_1, top1_at_5"),
        ("pictures/top1", "pictures has no figure top1; it has: none"),
        ("linear/top1", "the evaluations of this run: knn, shots, pictures, heldout"),
        ("knn", "it reads EVALUATION/FIGURE"),
    ],
)
def test_a_figure_that_no_evaluation_has_is_refused_before_training(wanted: str, message: str) -> None:
    data = Path("x")
    evaluations = [
        KNNConfig(data=data),
        FewShotConfig(data=data, name="shots", shots=(1, 5)),
        PicturesConfig(data=data),
        HeldOutConfig(data=data),
    ]
    with pytest.raises(ConfigError, match=message):
        best.require_known(CheckpointConfig(best=wanted), evaluations)
    for known in ("knn/top5", "shots/top1_at_5", "heldout/whatever the objective says"):
        best.require_known(CheckpointConfig(best=known), evaluations)
