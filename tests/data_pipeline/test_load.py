"""The loader gives the same batches from any process, rank count, worker count and starting point."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from data_pipeline.config import DataConfig
from data_pipeline.load import Loader, build_loader, sequential
from data_pipeline.manifest import Manifest
from data_pipeline.types import Batch, CenterCrop, RandomResizedCrop, ViewSpec
from tests.data_pipeline.sets import numbered_set, numbers_in, sample, write_set

VIEWS = [
    ViewSpec((8, 8), RandomResizedCrop((0.3, 1.0))),
    ViewSpec((6, 10), CenterCrop(1.0), flip=0.0),
]
NEEDS = frozenset({"views", "target", "index"})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return numbered_set(tmp_path_factory.mktemp("set"), [17, 30, 5, 11])


def loader(manifest: Manifest, position: int = 0, **changes: int) -> Loader:
    settings = {"batch_size": 12, "rank": 0, "world_size": 1, "workers": 0, "seed": 3} | changes
    workers = settings.pop("workers")
    config = DataConfig(manifest=manifest.path, image_size=8, workers=workers, window=8, max_broken=0)
    return build_loader(config, VIEWS, needs=NEEDS, position=position, **settings)


def equal(a: Batch, b: Batch) -> bool:
    assert a.target is not None and b.target is not None
    pairs = [
        *zip(a.views, b.views, strict=True),
        (a.seeds, b.seeds),
        (a.index, b.index),
        (a.target, b.target),
    ]
    return all(torch.equal(x, y) for x, y in pairs)


def by_index(batches: list[Batch]) -> dict[tuple[int, int], tuple[bytes, int]]:
    """(index, seed) to the pixels and target."""
    found = {}
    for batch in batches:
        for row in range(len(batch)):
            pixels = b"".join(view[row].numpy().tobytes() for view in batch.views)
            assert batch.target is not None
            found[int(batch.index[row]), int(batch.seeds[row])] = (pixels, int(batch.target[row]))
    return found


def test_batches_hold_what_they_say(manifest: Manifest) -> None:
    with loader(manifest) as batches:
        batch = next(batches)
        assert batches.samples == 63 and batches.position == 12
    assert [tuple(view.shape) for view in batch.views] == [(12, 3, 8, 8), (12, 3, 6, 10)]
    assert all(view.dtype == torch.uint8 for view in batch.views) and batch.seeds.dtype == torch.int64
    assert batch.target is not None
    assert numbers_in(batch.views[1].numpy()) == batch.index.tolist() == numbers_in(batch.views[0].numpy())
    assert (batch.target == batch.index % 10).all()


def test_an_epoch_is_every_sample_once_though_batches_straddle(manifest: Manifest) -> None:
    with loader(manifest) as batches:
        index = torch.cat([next(batches).index for _ in range(21)])  # 252 samples = 4 epochs
    counts = np.bincount(index.numpy(), minlength=63)
    assert (counts == 4).all()


@given(world=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 30))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_ranks_gives_the_same_global_batch(manifest: Manifest, world: int, step: int) -> None:
    with loader(manifest, 12 * step) as batches:
        whole = by_index([next(batches)])
    parts = []
    for rank in range(world):
        with loader(manifest, 12 * step, rank=rank, world_size=world) as batches:
            parts.append(next(batches))
    assert by_index(parts) == whole and sum(len(part) for part in parts) == 12


def test_going_on_anywhere_is_as_if_never_stopped(manifest: Manifest) -> None:
    with loader(manifest) as batches:
        through = [next(batches) for _ in range(8)]
    for at in (1, 5, 7):
        with loader(manifest, 12 * at) as batches:
            assert equal(next(batches), through[at])
    with loader(manifest, 7) as batches:
        assert len(next(batches)) == 12  # any integer will do


def test_workers_give_the_same_bytes(manifest: Manifest) -> None:
    with loader(manifest, 25) as plain:
        expected = [next(plain) for _ in range(8)]
    for workers in (1, 3):
        with loader(manifest, 25, workers=workers) as batches:
            for batch in expected:
                assert equal(next(batches), batch)


def test_workers_start_from_a_thread_and_batches_stay_theirs(manifest: Manifest) -> None:
    """A batch isn't overwritten by later ones, and the loader may be made anywhere."""
    kept: list[Batch] = []

    def work() -> None:
        with loader(manifest, workers=1) as batches:
            kept.extend(next(batches) for _ in range(6))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with loader(manifest) as plain:
        assert all(equal(batch, next(plain)) for batch in kept)


def test_a_set_in_its_own_order(manifest: Manifest) -> None:
    view = VIEWS[1]
    whole = list(sequential(manifest, view, batch_size=10))
    assert [len(batch) for batch in whole] == [10] * 6 + [3]
    assert torch.cat([batch.index for batch in whole]).tolist() == list(range(63))
    assert [n for batch in whole for n in numbers_in(batch.views[0].numpy())] == list(range(63))
    assert whole[-1].target is not None and whole[-1].target.tolist() == [0, 1, 2]
    parts = [list(sequential(manifest.path, view, batch_size=10, rank=r, world_size=4)) for r in range(4)]
    assert [i for part in parts for b in part for i in b.index.tolist()] == list(range(63))
    assert {sum(len(b) for b in part) for part in parts} == {15, 16}
    assert sum(len(b) for b in sequential(manifest, view, batch_size=10, limit=23)) == 23
    by_workers = list(sequential(manifest, view, batch_size=10, workers=2))
    assert all(equal(a, b) for a, b in zip(whole, by_workers, strict=True))


def test_more_ranks_than_samples(tmp_path: Path) -> None:
    manifest = numbered_set(tmp_path, [2])
    parts = [list(sequential(manifest, VIEWS[1], batch_size=4, rank=r, world_size=3)) for r in range(3)]
    assert [sum(len(b) for b in part) for part in parts] == [0, 1, 1]
    with loader(manifest, batch_size=6) as batches:  # three epochs in one batch
        assert sorted(next(batches).index.tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_stops_with_its_name(tmp_path: Path, workers: int) -> None:
    bad = sample(3)["png"][:60]
    manifest = write_set(tmp_path, [[sample(n) for n in range(3)], [{"png": bad, "cls": b"1"}]])
    with pytest.raises(DataError) as caught, loader(manifest, workers=workers, batch_size=4) as batches:
        next(batches)
    said = str(caught.value)
    assert "shard-000001.tar" in said and "'000003'" in said and "png" in said and "\n" not in said


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"png": sample(0)["png"], "cls": b"cat"}, "a label is a whole number, found 'cat'"),
        ({"png": sample(0)["png"], "cls": b"12"}, "label 12, but the manifest has 10 classes"),
        ({"png": sample(0)["png"], "cls": b"9" * 30}, "a label is a number from 0 to"),
        (
            {"cls": b"1"},
            "field jpg, jpeg, png, webp, bmp, gif and .*: missing; the sample has cls; .*--picture-field",
        ),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, fields: dict[str, bytes], named: str) -> None:
    manifest = write_set(tmp_path, [[sample(1), fields]], [str(n) for n in range(10)])
    with pytest.raises(DataError, match=named), loader(manifest, batch_size=2) as batches:
        next(batches)


def test_missing_labels_and_uneven_batches_are_refused_at_once(tmp_path: Path, manifest: Manifest) -> None:
    unlabelled = write_set(tmp_path, [[{"png": sample(0)["png"]}]])
    with pytest.raises(DataError, match="has no labels"):
        loader(unlabelled)
    with pytest.raises(ConfigError, match=r"train.batch_size: found 12; it has to be a multiple of the 5"):
        loader(manifest, world_size=5)
    with pytest.raises(DataError, match="no such manifest"):
        build_loader(
            DataConfig(manifest=tmp_path / "nowhere"), VIEWS, needs=NEEDS, seed=0, batch_size=1, rank=0,
            world_size=1, position=0,
        )  # fmt: skip


def test_sources_are_mixed_and_capped(tmp_path: Path) -> None:
    """Shares are exact, each source has its own epochs, and nothing is repeated beyond its cap."""
    numbered_set(tmp_path / "a", [30])
    write_set(tmp_path / "b", [[sample(500 + n) for n in range(10)]])
    also = [{"manifest": tmp_path / "b", "weight": 0.5, "max_epochs": 2}]
    config = DataConfig.model_validate({"manifest": tmp_path / "a", "also": also, "workers": 0})
    with build_loader(
        config, VIEWS[1:], needs=frozenset({"views"}), seed=0, batch_size=6, rank=0, world_size=1, position=0
    ) as batches:
        assert batches.samples == 40
        seen: list[int] = []
        with pytest.raises(DataError, match=r"b/manifest.json: has been repeated 2 times, its max_epochs"):
            while True:
                batch = next(batches)
                shown = numbers_in(batch.views[0].numpy())
                assert [n - 500 + 30 if n >= 500 else n for n in shown] == batch.index.tolist()
                seen += shown
        counts = batches.metrics()
        assert counts["source_1_samples"] == sum(n >= 500 for n in seen) <= 20
        assert counts["source_0_samples"] == sum(n < 500 for n in seen)
        assert counts["source_1_epochs"] == counts["source_1_samples"] / 10
    assert max(np.bincount([n for n in seen if n >= 500])) <= 2
