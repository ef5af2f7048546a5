"""The whole loader, pixels and all: killed anywhere, it goes on under other ranks and workers."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.load import Loader, build_loader
from data_pipeline.types import Batch, CenterCrop, RandomResizedCrop, ViewSpec
from tests.data_pipeline.sets import numbered_set, numbers_in

ROOT = Path(__file__).parents[2]
VIEWS = [ViewSpec((4, 4), RandomResizedCrop((0.3, 1.0))), ViewSpec((4, 4), CenterCrop(1.0), flip=0)]
NEEDS = frozenset({"views", "target", "index"})
MIX = {"also": [{"manifest": "b", "weight": 0.4}], "streams": 5, "window": 7, "max_broken": 0}


def loader(config: DataConfig, batch: int, world: int, rank: int, position: int) -> Loader:
    made = build_loader(
        config, VIEWS, needs=NEEDS, seed=9, batch_size=batch, rank=rank, world_size=world, position=position
    )
    assert isinstance(made, Loader)
    return made


def rows(batch: Batch) -> list[tuple[int, int, int, str]]:
    """Index, seed, target and pixels of each sample."""
    assert batch.target is not None
    pixels = [
        hashlib.sha256(b"".join(v[row].numpy().tobytes() for v in batch.views)) for row in range(len(batch))
    ]
    numbers = zip(batch.index.tolist(), batch.seeds.tolist(), batch.target.tolist(), strict=True)
    return [(*three, digest.hexdigest()) for three, digest in zip(numbers, pixels, strict=True)]


def steps(
    config: DataConfig, batch: int, world: int, position: int, count: int
) -> list[list[tuple[int, ...]]]:
    """What each global batch holds, over all ranks, sorted. No sample comes twice unless an epoch is over."""
    found: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
    for rank in range(world):
        with loader(config, batch, world, rank, position) as batches:
            for step in range(count):
                mine = next(batches)
                assert len(mine) == batch // world
                found[step] += rows(mine)  # type: ignore[arg-type]
    return [sorted(step) for step in found]


@given(
    sizes=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.3, 1.0, 2.5]), min_size=3, max_size=3),
    streams=st.integers(1, 9), window=st.integers(1, 20),
    worlds=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    start=st.integers(0, 10**6), before=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_any_manifest_mix_ranks_and_kill_point(
    sizes: list[list[int]], weights: list[float], streams: int, window: int, worlds: tuple[int, int],
    start: int, before: int,
) -> None:  # fmt: skip
    both = int(np.lcm(*worlds))
    batch, worlds = (both, worlds) if both <= 48 else (worlds[0], (worlds[0], 1))
    with tempfile.TemporaryDirectory() as folder:
        for number, shards in enumerate(sizes):
            numbered_set(Path(folder) / str(number), shards)
        also = [
            {"manifest": f"{folder}/{n}", "weight": weight} for n, weight in enumerate(weights[: len(sizes)])
        ]
        config = DataConfig.model_validate(
            {**also[0], "also": also[1:], "streams": streams, "window": window, "workers": 0, "max_broken": 0}
        )
        through = steps(config, batch, 1, start, before + 2)
        killed = steps(config, batch, worlds[0], start, before)
        resumed = steps(config, batch, worlds[1], start + before * batch, 2)
        assert killed + resumed == through


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("elastic")
    numbered_set(root / "a", [9, 14, 6, 11])
    numbered_set(root / "b", [7, 5])
    values = {**MIX, "manifest": root / "a", "also": [{"manifest": root / "b", "weight": 0.4}]}
    return DataConfig.model_validate({**values, "workers": 0})


def test_an_epoch_of_each_source_is_whole(config: DataConfig) -> None:
    """Each source by its own count: none of its samples comes a second time before all have come once."""
    with loader(config, 12, 1, 0, 0) as batches:
        seen = [next(batches) for _ in range(30)]
    for first, size in ((0, 40), (40, 12)):
        index = [i for batch in seen for i in batch.index.tolist() if first <= i < first + size]
        counts = np.bincount([i - first for i in index], minlength=size)
        assert counts.max() - counts.min() <= 1 and counts.sum() == len(index) > 2 * size
    assert all(n < 256 for batch in seen for n in numbers_in(batch.views[1].numpy()))


VICTIM = """
import sys
from data_pipeline.config import DataConfig
from tests.data_pipeline.test_elastic import loader, rows
config = DataConfig.model_validate_json(sys.argv[1])
with loader(config, 12, 3, int(sys.argv[2]), 120) as batches:
    for batch in batches:
        print(rows(batch), flush=True)
"""


def test_a_rank_with_workers_is_killed_and_others_go_on(config: DataConfig) -> None:
    """Rank 1 of 3 with four workers dies by SIGKILL after some batches; two ranks, 0 and 2 workers, go on."""
    straight = steps(config, 12, 1, 120, 9)
    four = config.model_copy(update={"workers": 4})
    command = [sys.executable, "-W", "ignore", "-c", VICTIM, four.model_dump_json(), "1"]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert victim.stdout is not None
    done = random.randint(1, 6)
    given_out = [victim.stdout.readline() for _ in range(done)]
    victim.kill()
    victim.wait()
    victim.stdout.close()
    with loader(config, 12, 3, 1, 120) as plain:
        assert given_out == [f"{rows(next(plain))}\n" for _ in range(done)]
    resumed: list[list[tuple[int, int, int, str]]] = [[], []]
    for rank, workers in ((0, 0), (1, 2)):
        other = config.model_copy(update={"workers": workers})
        with loader(other, 12, 2, rank, 120 + 12 * done) as batches:
            for step in resumed:
                step += rows(next(batches))
    assert [sorted(step) for step in resumed] == straight[done : done + 2]
