"""Broken samples are replaced, written down once, and stop the run when they are many."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from configs.errors import DataError
from data_pipeline.config import DataConfig
from data_pipeline.load import Loader, build_loader
from data_pipeline.manifest import Manifest
from data_pipeline.quarantine import Broken, Quarantine, quarantined
from data_pipeline.types import Batch, CenterCrop, ViewSpec
from tests.data_pipeline.sets import numbered_set, numbers_in, sample, write_set
from tests.places import FullDisk

VIEW = ViewSpec((12, 12), CenterCrop(1.0), flip=0)
BAD = {3, 21}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two shards of 20; samples 3 and 21 are broken."""
    samples = [sample(n) if n not in BAD else {**sample(n), "png": b"\x89PNG broken"} for n in range(40)]
    return write_set(tmp_path / "set", [samples[:20], samples[20:]], [str(n) for n in range(10)])


def loader(manifest: Manifest, file: Path | None = None, **changes: float) -> Loader:
    config = DataConfig(
        manifest=manifest.path,
        workers=int(changes.pop("workers", 0)),
        max_broken=changes.pop("max_broken", 0.01),
    )
    settings = {"seed": 5, "batch_size": 10, "rank": 0, "world_size": 1, "position": 0} | changes
    return build_loader(config, [VIEW], needs=frozenset({"views", "target"}), quarantine=file, **settings)  # type: ignore[arg-type]


def epoch(batches: Loader, count: int = 4) -> Batch:
    parts = [next(batches) for _ in range(count)]
    assert parts[0].target is not None
    return Batch(
        views=(torch.cat([part.views[0] for part in parts]),),
        seeds=torch.cat([part.seeds for part in parts]),
        index=torch.cat([part.index for part in parts]),
        target=torch.cat([part.target for part in parts if part.target is not None]),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_only_the_broken_rows_change(manifest: Manifest, tmp_path: Path, workers: int) -> None:
    whole = numbered_set(tmp_path / "whole", [20, 20])
    with loader(whole) as plain, loader(manifest, workers=workers) as batches:
        expected, found = epoch(plain), epoch(batches)
        assert batches.metrics()["broken_samples"] == 2
    assert torch.equal(expected.seeds, found.seeds) and found.target is not None
    for row, index in enumerate(expected.index.tolist()):
        stand_in = int(found.index[row])
        assert (stand_in != index) == (index in BAD) and stand_in // 20 == index // 20
        assert numbers_in(found.views[0][row : row + 1].numpy()) == [stand_in]
        assert int(found.target[row]) == stand_in % 10


def test_substitutes_dont_depend_on_the_cut(manifest: Manifest) -> None:
    with loader(manifest) as batches:
        whole = epoch(batches)
    parts = []
    for rank in (0, 1):
        with loader(manifest, rank=rank, world_size=2) as batches:
            parts.append(epoch(batches))
    pairs = {
        (int(seed), int(index)) for part in parts for seed, index in zip(part.seeds, part.index, strict=True)
    }
    assert pairs == {(int(seed), int(index)) for seed, index in zip(whole.seeds, whole.index, strict=True)}


def test_each_is_written_once_over_ranks_epochs_and_restarts(manifest: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    for rank in (0, 1):
        for _ in range(2):
            with loader(manifest, file, rank=rank, world_size=2) as batches:
                epoch(batches, 8)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(record["index"] for record in records) == sorted(BAD)
    assert {(r["shard"], r["key"], r["field"]) for r in records} == {
        ("shard-000000.tar", "000003", "png"),
        ("shard-000001.tar", "000021", "png"),
    }
    assert all("can't be decoded" in record["reason"] for record in records)
    file.write_text(file.read_text() + '{"cut')
    assert len(quarantined(file)) == 2


def broken(index: int) -> Broken:
    return Broken(0, index, os.fsdecode(b"caf\xe9.tar"), os.fsdecode(b"k\xe9y"), "png", "no picture", "x")


def test_a_sample_drawn_twice_in_a_batch_is_written_once(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    watched = Quarantine(file, 1)
    watched.add([broken(1), broken(2), broken(1)], 3)
    watched.add([broken(2)], 4)
    assert quarantined(file) == [broken(1), broken(2)] and watched.count == 4  # names come back as they were


def test_a_line_that_was_cut_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    Quarantine(file, 1).add([broken(1)], 1)
    file.write_bytes(file.read_bytes() + b'{"source": 0, "ind')  # the disk was full
    Quarantine(file, 1).add([broken(2)], 1)
    assert quarantined(file) == [broken(1), broken(2)]


@pytest.mark.parametrize("at", range(3))
def test_a_quarantine_that_cant_be_written_is_a_line(tmp_path: Path, at: int) -> None:
    file = tmp_path / "run" / "quarantine.jsonl"
    with (
        FullDisk(tmp_path / "run", at) as disk,
        pytest.raises(DataError, match=r"quarantine.jsonl: can't be"),
    ):
        Quarantine(file, 1).add([broken(1)], 1)
    assert disk.calls > at


def test_too_many_stop_the_run_with_a_summary(tmp_path: Path) -> None:
    bad = {"png": b"nothing", "cls": b"1"}
    manifest = write_set(tmp_path / "set", [[sample(0), *[bad] * 9]] * 2)
    with loader(manifest, max_broken=0.001) as batches, pytest.raises(DataError) as caught:
        epoch(batches, 8)
    said = str(caught.value)
    assert said.startswith("data.max_broken: 1") and "shard-00000" in said and "not a picture" in said
    assert "\n" not in said


def test_zero_stops_at_the_first_with_its_name(manifest: Manifest) -> None:
    with loader(manifest, max_broken=0.0) as batches, pytest.raises(DataError, match=r"sample '0000(03|21)'"):
        epoch(batches)


def test_a_shard_without_one_good_sample_stops(tmp_path: Path) -> None:
    manifest = write_set(tmp_path / "set", [[{"png": b"nothing", "cls": b"1"}] * 3])
    with (
        loader(manifest, batch_size=2) as batches,
        pytest.raises(DataError, match="32 samples tried in place"),
    ):
        next(batches)


def test_a_missing_shard_is_not_replaced(manifest: Manifest) -> None:
    manifest.shard_path(1).unlink()
    with loader(manifest) as batches, pytest.raises(DataError, match="missing shard"):
        epoch(batches)
