"""Every config that ships loads, says what it claims, and reloads equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.loading import PACKAGED, Config, dump, load, validate
from configs.sweep import SweepConfig
from launch.cluster import ClusterConfig
from pretrain.config import RunConfig

SCHEMAS: dict[str, type[Config]] = dict.fromkeys(("demo", "smoke", "mae", "moco"), RunConfig) | {
    "clusters": ClusterConfig,
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


def test_there_are_configs() -> None:
    assert {path.relative_to(PACKAGED).parts[0] for path in FILES} == set(SCHEMAS)
