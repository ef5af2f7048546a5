"""Every way in which a shard can fail is told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.manifest import Manifest
from data_pipeline.read import IMAGE_FIELDS, LABEL_FIELDS, Reader, SampleError, ShardError
from tests.data_pipeline.sets import numbered_set, sample, write_set


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return numbered_set(tmp_path, [5, 6])


def test_fields_are_the_bytes_that_were_packed(manifest: Manifest) -> None:
    reader = Reader(manifest)
    for shard, row, number in ((0, 0, 0), (1, 5, 10), (0, 4, 4)):
        expected = sample(number)
        assert reader.read(shard, row, [IMAGE_FIELDS, LABEL_FIELDS]) == [
            ("png", expected["png"]),
            ("cls", expected["cls"]),
        ]
        assert reader.key(shard, row) == f"{number:06d}"
    reader.close()


def test_a_missing_field_is_a_sample_error(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, [[sample(0), {"png": b"x"}]])
    with pytest.raises(SampleError, match=r"sample '000001': field cls: missing; the sample has png"):
        Reader(manifest).read(0, 1, [IMAGE_FIELDS, LABEL_FIELDS])


def failure(manifest: Manifest) -> ShardError:
    with pytest.raises(ShardError) as caught:
        Reader(manifest).read(1, 0, [IMAGE_FIELDS])
    assert str(manifest.shard_path(1)) in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


def test_missing_truncated_and_changed_shards_are_told_apart(manifest: Manifest) -> None:
    path = manifest.shard_path(1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert "truncated shard" in str(failure(manifest))
    path.write_bytes(data + b"x")
    assert "changed shard" in str(failure(manifest))
    other = numbered_set(manifest.directory / "other", [3, 6]).shard_path(1).read_bytes()
    assert len(other) == len(data)
    path.write_bytes(other)
    assert "changed shard" in str(failure(manifest))
    path.unlink()
    assert "missing shard" in str(failure(manifest))


def test_a_vanished_mount_is_not_a_missing_shard(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    manifest = numbered_set(tmp_path / "mount" / "set", [2, 2])
    manifest.index(1)
    (tmp_path / "away").mkdir()
    reader = Reader(manifest, locate=lambda shard: tmp_path / "gone" / manifest.shards[shard].name)
    with pytest.raises(ShardError, match="still mounted"):
        reader.read(1, 0, [IMAGE_FIELDS])


def test_a_shard_that_shrinks_while_open_is_truncated(manifest: Manifest) -> None:
    reader = Reader(manifest)
    reader.read(1, 0, [IMAGE_FIELDS])
    with manifest.shard_path(1).open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(ShardError, match="truncated shard: 3000 bytes"):
        reader.read(1, 5, [IMAGE_FIELDS])


def test_one_changed_byte_is_found(manifest: Manifest) -> None:
    index = manifest.index(1)
    at = index.place(2, "png")[0] + 40
    with manifest.shard_path(1).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    reader = Reader(manifest)
    with pytest.raises(SampleError, match=r"shard-000001.tar: sample '000007': field png: payload differs"):
        reader.read(1, 2, [IMAGE_FIELDS])
    assert reader.read(1, 3, [IMAGE_FIELDS])[0][1] == sample(8)["png"]


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.read._OPEN_FILES", 3)
    manifest = numbered_set(tmp_path, [2] * 10)
    reader, before = Reader(manifest), len(list(Path("/proc/self/fd").iterdir()))
    for shard in list(range(10)) * 2:
        reader.read(shard, 1, [IMAGE_FIELDS])
    assert len(list(Path("/proc/self/fd").iterdir())) - before == 3
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
