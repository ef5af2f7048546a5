"""Looking at a model changes nothing, and gives a set's features in its order on any number of ranks."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.errors import DataError
from data_pipeline.augment import augmented
from data_pipeline.manifest import Manifest
from data_pipeline.types import CenterCrop, RandomResizedCrop, ViewSpec
from pretrain import collectives
from pretrain.evaluators.effective_rank import EffectiveRankConfig
from pretrain.evaluators.few_shot import FewShotConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.evaluators.linear import LinearConfig
from pretrain.judging import subject as subject_module
from pretrain.judging.features import Features, fixed_fifth, standardised
from pretrain.judging.subject import RawPixels, Subject, evaluation_view, mean_over_set, undisturbed
from pretrain.parts.augmentation import Augmentation

Ranks = Callable[..., list[Any]]
VIEW = ViewSpec(size=(32, 32), crop=CenterCrop(1.0), flip=0.0)


class Restless(nn.Module):
    """A network that draws from every generator and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.frozen = nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3)

    def forward(self, images: Tensor) -> Tensor:
        torch.rand(1), np.random.rand(1), random.random()
        return self.drop(self.frozen(self.norm(images.mean(dim=(2, 3)))))  # type: ignore[no-any-return]


def test_looking_leaves_modes_statistics_and_all_random_state(digits: Path) -> None:
    module = Restless().train()
    module.frozen.eval()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    features = Subject(module, module, VIEW, torch.device("cpu")).features(digits / "val" / "manifest.json")
    assert not features.values.requires_grad
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == expected
    assert module.training and module.drop.training and not module.frozen.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_error_while_looking_puts_everything_back() -> None:
    module = Restless().train()
    module.frozen.eval()
    with pytest.raises(ZeroDivisionError), undisturbed(module, torch.device("cpu")):
        assert not module.training
        raise ZeroDivisionError
    assert module.training and not module.frozen.training


def test_a_set_is_encoded_once_however_many_ask(digits: Path) -> None:
    seen = []

    def encode(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.flatten(1)

    told: list[int] = []
    subject = Subject(RawPixels(), encode, VIEW, torch.device("cpu"), batch_size=100, advance=told.append)
    val = digits / "val" / "manifest.json"
    assert subject.features(val) is subject.features(val)
    assert sum(seen) == sum(told) == len(subject.features(val))
    assert max(seen) == 100


@pytest.mark.parametrize(("batch_size", "wanted"), [(50, 2), (256, 0)])
def test_workers_decode_the_same_and_only_where_it_pays(
    digits: Path, pixels: Subject, monkeypatch: pytest.MonkeyPatch, batch_size: int, wanted: int
) -> None:
    asked: list[int] = []
    plain = subject_module.sequential

    def watched(*arguments: Any, workers: int, **options: Any) -> Any:
        asked.append(workers)
        return plain(*arguments, workers=workers, **options)

    monkeypatch.setattr(subject_module, "sequential", watched)
    val = digits / "val" / "manifest.json"
    helped = dataclasses.replace(pixels, workers=2, batch_size=batch_size, _seen={})
    alone = dataclasses.replace(pixels, batch_size=batch_size, _seen={})
    assert torch.equal(helped.features(val).values, alone.features(val).values)
    assert asked == [wanted, 0]


def on_a_rank(
    digits: str, batch_size: int
) -> tuple[list[float], list[int], dict[str, float], dict[str, float]]:
    from pretrain.engines import processes

    processes.start()
    try:
        subject = Subject(
            RawPixels(), lambda x: x[:, 0, ::4, ::4].flatten(1), VIEW, torch.device("cpu"), None, batch_size
        )
        val = Path(digits) / "val" / "manifest.json"
        features = subject.features(val)
        knn = KNNConfig(data=val).build()(subject).values
        few = FewShotConfig(data=val, shots=(1, 5), draws=3).build()(subject).values
        linear = LinearConfig(data=val, epochs=2, learning_rates=(0.1, 1.0, 3.0)).build()(subject).values
        rank = EffectiveRankConfig(data=val).build()(subject).values
        means = mean_over_set(subject, val, lambda b: {"label": b.target.double().mean()})  # type: ignore[union-attr]
        return (
            features.values.sum(dim=1).tolist(),
            features.labels.tolist(),
            {**knn, **few, "linear": linear["top1"], **rank},
            means,
        )
    finally:
        processes.stop()


def test_ranks_give_what_one_process_gives(digits: Path, ranks: Ranks) -> None:
    (alone,) = ranks(1, on_a_rank, digits=str(digits), batch_size=64)
    several = [
        found for count in (2, 4) for found in ranks(count, on_a_rank, digits=str(digits), batch_size=50)
    ]
    assert len(several) == 6
    for sums, labels, scores, means in several:
        assert labels == alone[1]
        assert sums == pytest.approx(alone[0], rel=1e-5)
        assert scores == pytest.approx(alone[2])
        assert means == pytest.approx(alone[3])


def gather_unequal() -> tuple[list[list[float]], list[str], float]:
    from pretrain.engines import processes

    here = processes.start()
    try:
        rows = torch.full((2 * here.rank, 2), float(here.rank))
        names = {"a", "b"} if here.rank else set()
        total = collectives.total(torch.tensor(float(here.rank + 1)))
        return collectives.gather_uneven(rows).tolist(), collectives.union(names), float(total)
    finally:
        processes.stop()


def test_a_rank_may_have_nothing_to_give(ranks: Ranks) -> None:
    for rows, names, total in ranks(3, gather_unequal):
        assert rows == [[1.0, 1.0]] * 2 + [[2.0, 2.0]] * 4
        assert names == ["a", "b"]
        assert total == 6


def test_only_what_needs_labels_asks_for_them(tmp_path: Path, pixels: Subject) -> None:
    from data_pipeline import demo

    demo.make(demo.DemoConfig(name="digits"), tmp_path / "d")
    labelled = Manifest.load(tmp_path / "d" / "val")
    Manifest(labelled.directory, labelled.shards, ("png",), ()).save()
    val = tmp_path / "d" / "val" / "manifest.json"
    with pytest.raises(DataError, match="has no class labels, which knn needs"):
        KNNConfig(data=val).build()(pixels)
    assert (pixels.features(val).labels == -1).all()


def test_sets_of_other_classes_are_refused(digits: Path, tmp_path: Path, pixels: Subject) -> None:
    manifest = Manifest.load(shutil.copytree(digits / "val", tmp_path / "val"))
    dataclasses.replace(manifest, classes=manifest.classes[::-1]).save()
    config = KNNConfig(data=tmp_path / "val", labelled=digits / "train/manifest.json")
    with pytest.raises(DataError, match=r"its 10 classes aren't the 10 of .*train/manifest.json, which knn"):
        config.build()(pixels)
    EffectiveRankConfig(data=tmp_path / "val", labelled=digits / "train/manifest.json").require_data()


def test_a_fifth_of_each_class_is_held_back_always_the_same() -> None:
    labels = torch.arange(103) % 4
    features = Features(torch.arange(103.0).unsqueeze(1), labels)
    learn, judge = fixed_fifth(features)
    assert len(learn) + len(judge) == 103
    assert torch.bincount(judge.labels).tolist() == [5, 5, 5, 5]
    together = torch.cat([learn.values, judge.values]).flatten().sort().values
    assert torch.equal(together, torch.arange(103.0))
    assert torch.equal(fixed_fifth(features)[1].values, judge.values)


def test_a_feature_that_never_moves_counts_for_nothing() -> None:
    values = torch.cat([torch.randn(50, 3), torch.full((50, 1), 1e6)], dim=1)
    learn = Features(values, torch.arange(50) % 2)
    one, other = standardised(learn, learn.pick(torch.arange(5)))
    assert (one.values[:, 3] == 0).all()
    assert (other.values[:, 3] == 0).all()
    assert other.values.isfinite().all()
    torch.testing.assert_close(one.values[:, :3].std(dim=0), torch.ones(3))


def test_an_evaluation_shows_images_as_they_are() -> None:
    strong = Augmentation(rotation=20, jitter=1.0, grayscale=1.0, blur=1.0, solarize=1.0).view((8, 8))
    view = evaluation_view(strong, 1.0)
    images = torch.arange(3 * 64).reshape(1, 3, 8, 8).to(torch.uint8)
    assert torch.equal(augmented(images, torch.tensor([5]), view), images)
    assert not torch.equal(augmented(images, torch.tensor([5]), strong), images)


def test_the_evaluation_view_shares_the_training_normalisation() -> None:
    training = ViewSpec(
        size=(64, 48), crop=RandomResizedCrop(), mean=(0.5, 0.5, 0.5), interpolation="bilinear"
    )
    view = evaluation_view(training, 0.9)
    assert (view.crop, view.flip) == (CenterCrop(0.9), 0.0)
    assert (view.size, view.mean, view.std, view.interpolation) == (
        training.size, training.mean, training.std, training.interpolation,
    )  # fmt: skip
