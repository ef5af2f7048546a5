"""What is refused or said before the first sample is read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from configs.errors import ConfigError
from data_pipeline.config import DataConfig
from data_pipeline.facts import facts_of
from data_pipeline.load import build_loader
from data_pipeline.types import CenterCrop, ViewSpec
from tests.data_pipeline.sets import numbered_set

NEEDS = frozenset({"views"})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources of 30 and 10 samples; a third of the samples come from the second, at most twice each."""
    root = tmp_path_factory.mktemp("sources")
    for name, sizes in (("a", [10, 10, 10]), ("b", [5, 5])):
        numbered_set(root / name, sizes)
    also = [{"manifest": root / "b", "weight": 0.5, "max_epochs": 2}]
    return DataConfig.model_validate({"manifest": root / "a", "also": also, "workers": 0})


def test_an_epoch_is_all_sources_together(config: DataConfig) -> None:
    facts = facts_of(config)
    assert facts.samples == 40
    assert facts.hash == "+".join(manifest.hash for manifest in facts.manifests)
    alone = facts_of(DataConfig(manifest=config.manifest))
    assert alone.samples == 30 and alone.hash == facts.manifests[0].hash


def test_too_many_repeats_are_refused_before_training(config: DataConfig) -> None:
    """Up to the very sample at which the second source would begin its third epoch."""
    facts = facts_of(config)
    plan = facts.plan(0)
    enough = next(n for n in range(1000) if plan.counts(n + 1)[1] > 20)
    assert 40 < enough < 90
    facts.require(NEEDS, samples=enough)
    told = rf"data.also.0.max_epochs: found 2, but {enough + 1} samples would take 2.1 epochs of .*; lower"
    with pytest.raises(ConfigError, match=told):
        facts.require(NEEDS, samples=enough + 1)
    capped = facts_of(DataConfig(manifest=config.manifest, max_epochs=1.5))
    capped.require(NEEDS, samples=45)
    with pytest.raises(ConfigError, match=r"data.max_epochs: found 1.5, but 46 samples"):
        capped.require(NEEDS, samples=46)


@pytest.mark.parametrize(
    ("streams", "batch", "world", "local", "said"),
    [
        (3, 6, 1, 1, ""),
        (3, 6, 3, 3, ""),
        (3, 6, 2, 2, "3 streams, a batch of 6 and 1 sources don't divide evenly among 2 ranks: some"),
        (3, 8, 4, 2, "3 streams, a batch of 8 and 1 sources don't divide evenly among 2 nodes: some shards"),
        (2, 8, 4, 2, ""),
    ],
)
def test_counts_that_dont_divide_are_said(
    config: DataConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    streams: int, batch: int, world: int, local: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    data = DataConfig(manifest=config.manifest, workers=0, streams=streams)
    with caplog.at_level(logging.INFO):
        for rank in range(world):
            build_loader(
                data, [ViewSpec((8, 8), CenterCrop())], needs=NEEDS, seed=0, batch_size=batch, rank=rank,
                world_size=world, position=0,
            ).close()  # fmt: skip
    assert [said in message for message in caplog.messages] == [True] * bool(said), caplog.messages


def test_a_cap_is_held_against_the_path_of_its_source(tmp_path: Path) -> None:
    numbered_set(tmp_path / "set", [4])
    data = DataConfig.model_validate(
        {"manifest": tmp_path / "set", "also": [{"manifest": tmp_path / "set", "max_epochs": 1}]}
    )
    with pytest.raises(ConfigError, match=r"data.also.0.max_epochs: found 1, .*set/manifest.json"):
        facts_of(data).require(NEEDS, samples=100)
