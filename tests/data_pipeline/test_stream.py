"""Stream mode reads what webdataset reads, and runs no command unasked."""

from __future__ import annotations

import shlex
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from configs.errors import DataError
from data_pipeline.stream import StreamConfig, stream
from data_pipeline.types import Batch, CenterCrop, ViewSpec
from tests.data_pipeline.sets import numbered_set, numbers_in, sample, write_set

VIEW = ViewSpec((12, 12), CenterCrop(1.0), flip=0)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # webdataset leaves its files open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def batches(shards: list[str], count: int, **settings: object) -> list[Batch]:
    config = StreamConfig(
        shards=tuple(shards), samples=10, shuffle=5, allow_shell=bool(settings.pop("shell", 0))
    )
    values = {"needs": frozenset({"views", "target"}), "seed": 1, "batch_size": 6} | settings
    return list(islice(stream(config, [VIEW], **values), count))  # type: ignore[arg-type]


def shown(found: list[Batch]) -> list[int]:
    return [number for batch in found for number in numbers_in(batch.views[0].numpy())]


def test_every_sample_comes_and_ranks_share_the_shards(tmp_path: Path) -> None:
    numbered_set(tmp_path, [6, 6, 6, 6])
    pattern = [str(tmp_path / "shard-{000000..000003}.tar")]
    whole = batches(pattern, 4)
    assert Counter(shown(whole)) == dict.fromkeys(range(24), 1)
    assert all(batch.target is not None and batch.views[0].shape == (6, 3, 12, 12) for batch in whole)
    parts = [shown(batches(pattern, 4, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(24))


def test_commands_are_run_only_when_allowed(tmp_path: Path) -> None:
    manifest = numbered_set(tmp_path, [6])
    command = f"pipe:cat {shlex.quote(str(manifest.shard_path(0)))}"
    with pytest.raises(DataError, match="runs a shell command; set allow_shell"):
        batches([command], 1)
    assert sorted(shown(batches([command], 1, shell=True))) == list(range(6))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"png": b"nothing", "cls": b"1"}, "sample '000000': field png: can't be decoded"),
        ({"txt": b"only"}, "no picture; its fields are txt"),
        ({"png": sample(1)["png"], "cls": b"x"}, "a label is a whole number"),
        (
            {"png": sample(1)["png"], "pyd": b"cos\nsystem\n(S'touch hacked'\ntR."},
            "a label is a whole number",
        ),
    ],
)
def test_bad_samples_are_named_and_no_pickle_is_opened(
    tmp_path: Path, fields: dict[str, bytes], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = write_set(tmp_path, [[fields]])
    with pytest.raises(DataError, match=named):
        batches([str(manifest.shard_path(0))], 1, batch_size=1)
    assert not (tmp_path / "hacked").exists()
