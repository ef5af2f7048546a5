"""Every config that ships loads, says what it claims, and reloads equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.loading import PACKAGED, Config, dump, load, validate
from configs.sweep import SweepConfig
from launch.slurm.cluster import ClusterConfig
from pretrain import encoders
from pretrain.config import RunConfig
from pretrain.finetune import FineTuneConfig
from pretrain.objective import BuildContext

RECIPES = ("demo", "smoke", "mae", "moco", "moco_v3", "clip")
SCHEMAS: dict[str, type[Config]] = dict.fromkeys(RECIPES, RunConfig) | {
    "clusters": ClusterConfig,
    "finetune": FineTuneConfig,
    "sweeps": SweepConfig,
}
"""What the files of each folder of configs/ are."""

FILES = sorted(PACKAGED.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGED)))
def test_it_loads_and_reloads_equal(path: Path, tmp_path: Path) -> None:
    schema = SCHEMAS[path.relative_to(PACKAGED).parts[0]]
    config = load(path, schema)
    assert load(path.relative_to(PACKAGED).with_suffix(""), schema) == config
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml", schema) == config
    assert validate(config.model_dump(mode="json"), schema, source="dump") == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGED)))
def test_it_is_a_claim(path: Path) -> None:
    """A heading says what it is, how to run it and what to expect of it."""
    heading = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert path.read_text().startswith("# ")
    said = [line.split()[1] for line in heading if len(line.split()) > 1]
    assert {"Command", "Expect"} <= set(said)


RUNS = [path for path in FILES if path.relative_to(PACKAGED).parts[0] in RECIPES]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(PACKAGED)))
def test_its_model_can_be_built(path: Path) -> None:
    """On the meta device, as before a run: encoder arguments, heads, towers and tokenizer fit."""
    config = load(path, RunConfig)
    size = config.data.image_size
    image_size = size if isinstance(size, tuple) else (size, size)
    tokenizer = config.data.tokenizer
    with torch.device("meta"):
        encoder = encoders.build(config.encoder, image_size)
        context = BuildContext(
            encoder, image_size, 1_281_167, config.train.batch_size, config.train.autocast,
            vocabulary=tokenizer.vocabulary if tokenizer else None,
            text_length=tokenizer.context if tokenizer else None,
        )  # fmt: skip
        objective = config.objective.build(context)
    config.optimizer.require_possible(config.train.zero_stage)
    config.optimizer.schedule_for(
        config.train.batch_size, 1_281_167, config.train.duration.steps(config.train.batch_size, 1_281_167)
    )
    grouped = [name for group in objective.param_groups() for name, _ in group.parameters]
    assert sorted(grouped) == sorted(name for name, p in objective.named_parameters() if p.requires_grad)


def test_there_are_configs() -> None:
    assert {path.relative_to(PACKAGED).parts[0] for path in FILES} == set(SCHEMAS)
