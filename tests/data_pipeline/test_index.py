"""The index accounts for every byte of a shard: damage that tar readers pass over is named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from configs.errors import DataError
from data_pipeline.index import Index, index_shard
from data_pipeline.manifest import Manifest, save_index
from data_pipeline.members import split_name
from data_pipeline.shards import write_shard
from tests.data_pipeline.sets import numbered_set

SAMPLES = [(f"a/{n:04d}", {"jpg": bytes([n]) * (700 + n), "txt": f"caption {n}".encode()}) for n in range(20)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "s.tar", SAMPLES)
    return tmp_path / "s.tar"


def test_members_lie_where_the_index_says(shard: Path) -> None:
    index, digest = index_shard(shard)
    data = shard.read_bytes()
    assert len(digest) == 64 and index.shard_bytes == len(data)
    assert index.fields == ("jpg", "txt") and index.keys() == [key for key, _ in SAMPLES]
    for row, (_, fields) in enumerate(SAMPLES):
        for name in index.fields:
            at, size = index.place(row, name)
            assert data[at : at + size] == fields[name]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_is_written_and_indexed(shard: Path) -> None:
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == index_shard(shard)[0].keys()
    assert [(s["jpg"], s["txt"]) for s in read] == [(f["jpg"], f["txt"]) for _, f in SAMPLES]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, shard: Path) -> None:
    write_shard(tmp_path / "again.tar", [(key, dict(reversed(fields.items()))) for key, fields in SAMPLES])
    assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_writers_tars(tmp_path: Path, kind: int) -> None:
    """Folders, long names, missing and repeated fields, members without a field: as webdataset reads them."""
    long = "deep/" * 30 + "name"
    members = [
        "d/",
        "1.jpg",
        "1.json",
        "2.jpg",
        f"{long}.jpg",
        "README",
        "3.seg.png",
        "3.jpg",
        "3.jpg",
        ".hidden",
    ]
    path = tmp_path / "other.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for number, name in enumerate(members):
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type, info.size = (tarfile.DIRTYPE, 0) if name.endswith("/") else (tarfile.REGTYPE, number)
            tar.addfile(info, io.BytesIO(bytes(number)))
    index = index_shard(path)[0]
    assert index.keys() == ["1", "2", long, "3", "3"]
    assert index.fields == ("jpg", "json", "seg.png")
    assert [index.fields_of(n) for n in range(5)] == [
        ["jpg", "json"],
        ["jpg"],
        ["jpg"],
        ["jpg", "seg.png"],
        ["jpg"],
    ]


@pytest.mark.parametrize("name", ["a.jpg", "d.x/a.b.c", "a", "/a.jpg", "d/.b", ".b", "a.", "A.JPG", "d/a"])
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    stem, field = base_plus_ext(name)
    expected = (stem, field.lower()) if stem and field and not stem.endswith("/") else None
    assert split_name(name) == expected


HEADER = 512 * 5  # start of the third member's header


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: data[:HEADER] + b"\xff" + data[HEADER + 1 :], "damaged tar header at byte 2560"),
        (lambda data: data[: HEADER + 100], "truncated shard"),
        (lambda data: data[:HEADER], "truncated shard"),
        (lambda data: data[: HEADER + 512], "truncated shard"),
        (lambda data: data[: HEADER + 700], "truncated shard"),
        (lambda data: data[:HEADER] + bytes(1024) + data[HEADER + 1024 :], "damaged tar header"),
        (lambda data: b"", "empty file"),
        (lambda data: bytes(10240), "empty shard"),
        (lambda data: b"\x1f\x8b" + data, "not a plain tar"),
    ],
)
def test_damage_is_named(shard: Path, damage: object, named: str) -> None:
    shard.write_bytes(damage(shard.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=named) as caught:
        index_shard(shard)
    assert str(shard) in str(caught.value) and "\n" not in str(caught.value)


def test_a_sidecar_comes_back_whole_or_not_at_all(shard: Path) -> None:
    data = index_shard(shard)[0].to_bytes()
    assert Index.from_bytes(data, "x").to_bytes() == data
    for place in (0, 9, 30, len(data) // 2, len(data) - 1):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(DataError, match=r"x: .*keel data index"):
            Index.from_bytes(damaged, "x")
        with pytest.raises(DataError, match=r"x: .*keel data index"):
            Index.from_bytes(data[:place], "x")


def test_a_sidecar_of_another_format_is_refused(shard: Path) -> None:
    old = b"keelidx1" + index_shard(shard)[0].to_bytes()[8:]
    with pytest.raises(DataError, match="x: a shard index of format 1, and this keel reads 2 and 3"):
        Index.from_bytes(old, "x")


def test_a_manifest_is_its_content(tmp_path: Path) -> None:
    first, second = (numbered_set(tmp_path / name, [3, 4]) for name in ("one", "two"))
    assert first.hash == second.hash and first.samples == 7
    assert numbered_set(tmp_path / "three", [4, 3]).hash != first.hash
    moved = tmp_path / "moved"
    first.directory.rename(moved)
    assert Manifest.load(moved).hash == first.hash
    assert Manifest.load(moved / "manifest.json").index(1).keys() == ["000003", "000004", "000005", "000006"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"samples": 4,', '"samples": 5,', "changed by hand"),
        ('"format": 1', '"format": 9', "format 9"),
        ('"classes"', '"class"', "not a whole manifest"),
        ("{", "", "isn't JSON"),
        ('"samples": 3,', '"samples": "x",', "not a whole manifest"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = numbered_set(tmp_path, [3, 4]).path
    path.write_text(path.read_text().replace(old, new, 1) if old != "{" else path.read_text()[1:])
    with pytest.raises(DataError, match=named) as caught:
        Manifest.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such manifest; make one with keel data"):
        Manifest.load(tmp_path)


def test_an_index_of_another_shard_is_refused(tmp_path: Path) -> None:
    manifest = numbered_set(tmp_path, [3, 4])
    save_index(tmp_path, manifest.index(0), manifest.shards[1].sha256)
    with pytest.raises(DataError, match="make it anew"):
        manifest.index(1)
    manifest.index_path(1).unlink()
    with pytest.raises(DataError, match=r"no index for shard shard-000001.tar"):
        manifest.index(1)
