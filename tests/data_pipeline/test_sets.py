"""Making data sets: demo sets, packing, indexing others' shards, checking and looking at them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import DataError
from data_pipeline import demo, indexing
from data_pipeline.config import DataConfig
from data_pipeline.decode import decode
from data_pipeline.demo import DemoConfig
from data_pipeline.load import build_loader
from data_pipeline.manifest import Manifest
from data_pipeline.pack import pack
from data_pipeline.read import IMAGE_FIELDS, LABEL_FIELDS, Reader
from data_pipeline.shapes import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, V3, draw
from data_pipeline.stats import stats
from data_pipeline.types import CenterCrop, ViewSpec
from data_pipeline.verify import verify
from tests.data_pipeline.sets import encoded, numbered_set, photograph, sample, write_set


def everything(manifest: Manifest) -> list[tuple[np.ndarray, bytes]]:
    reader = Reader(manifest)
    return [
        (decode(image), label)
        for shard, size in enumerate(manifest.sizes.tolist())
        for row in range(size)
        for (_, image), (_, label) in [reader.read(shard, row, [IMAGE_FIELDS, LABEL_FIELDS])]
    ]


def test_digits_are_scikit_learns_split_once_and_for_all(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    config = DemoConfig(name="digits")
    demo.make(config, tmp_path / "d")
    train, val = (everything(Manifest.load(tmp_path / "d" / split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (1438, 359)
    counts = np.bincount([int(label) for _, label in val])
    assert counts.min() >= 35 and counts.max() <= 37
    images = {image.tobytes() for image, _ in train + val}
    originals = load_digits().images
    small = [np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX)) for image, _ in val[:20]]
    for image in small:
        distances = np.abs(originals * 255 / 16 - image[..., 0]).mean(axis=(1, 2))
        assert distances.min() < 20
    assert len(images) > 1780 and train[0][0].shape == (32, 32, 3)
    demo.make(config, tmp_path / "again")
    for split in ("train", "val"):
        assert Manifest.load(tmp_path / "again" / split).hash == Manifest.load(tmp_path / "d" / split).hash


def test_a_whole_demo_set_is_kept_and_another_refused(tmp_path: Path) -> None:
    config, calls = DemoConfig(name="shapes", samples=30, val_samples=10), []
    demo.make(config, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(30, 30), (10, 10)]
    stamp = (tmp_path / "train" / "manifest.json").stat().st_mtime_ns
    demo.make(config, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == 2 and (tmp_path / "train" / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"other settings.*samples 30.*samples 31"):
        demo.make(config.model_copy(update={"samples": 31}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]


def test_an_interrupted_demo_leaves_nothing_half_made(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.make(DemoConfig(name="shapes", samples=10, val_samples=10), tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_pictures_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = draw(2000, 32, seed=1)
        torch.set_num_threads(3)
        assert torch.equal(draw(2000, 32, seed=1).images, alone.images)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_shapes_are_drawn_and_told_alike() -> None:
    drawn, again = draw(300, 32, seed=4), draw(300, 32, seed=4, difficulty=V3)
    assert torch.equal(drawn.images, again.images) and drawn.captions == again.captions
    assert not torch.equal(drawn.images, draw(300, 32, seed=5).images)
    assert drawn.images.shape == (300, 3, 32, 32) and drawn.images.dtype == torch.uint8
    assert set(drawn.labels.tolist()) == set(range(10))
    for label, caption in zip(drawn.labels.tolist(), drawn.captions, strict=True):
        words = caption.replace(",", "").split()
        assert SHAPES[label] in words and any(colour in words for colour in COLOURS)
        assert set(words) <= {
            *SHAPES, *COLOURS, *TEXTURES, *SIZES, *" ".join(PLACES).split(),
            "a", "an", "at", "the", "there", "is", "in", "that", "photo", "of",
        }  # fmt: skip
        assert " a orange" not in caption
    assert draw(3, 64, seed=0).images.shape == (3, 3, 64, 64)


def test_raw_pixels_barely_tell_shapes_apart() -> None:
    """The difficulty that was measured: a nearest-mean classifier on pixels stays near chance (10 %)."""
    train, test = draw(1500, 32, seed=1), draw(500, 32, seed=2)
    flat = [d.images.flatten(1).float() for d in (train, test)]
    means = torch.stack([flat[0][train.labels == label].mean(0) for label in range(10)])
    right = (torch.cdist(flat[1], means).argmin(1) == test.labels).float().mean()
    assert right < 0.2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        name = (
            tmp_path / "in" / ("dog", "cat")[number % 2] / f"{number:02d}.{('png', 'jpg')[number % 3 == 0]}"
        )
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(encoded(photograph(20, 24, number), "PNG" if name.suffix == ".png" else "JPEG"))
    return tmp_path / "in"


def test_a_folder_is_packed_alike_by_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    manifests = [
        pack(folder, tmp_path / f"out{processes}", per_shard=5, processes=processes) for processes in (1, 2)
    ]
    assert manifests[0].hash == manifests[1].hash and manifests[0].classes == ("cat", "dog")
    assert manifests[0].sizes.tolist() == [5, 5, 2]
    packed = {image.tobytes(): label for image, label in everything(manifests[0])}
    for path in folder.rglob("*.*"):
        assert (
            packed[decode(path.read_bytes()).tobytes()]
            == str(("cat", "dog").index(path.parent.name)).encode()
        )
    assert verify(manifests[1]).whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out1", "out2"]


def test_an_interrupted_packing_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import pack as packing

    def interrupt(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "out", per_shard=4, progress=interrupt)
    assert not (tmp_path / "out").exists()
    written = []
    real = packing.write_shard
    monkeypatch.setattr(
        packing, "write_shard", lambda path, samples: written.append(path) or real(path, samples)
    )
    manifest = pack(folder, tmp_path / "out", per_shard=4)
    assert [path.name for path in written] == ["shard-000002.tar"] and verify(manifest).whole
    assert manifest.hash == pack(folder, tmp_path / "fresh", per_shard=4).hash


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_with_captions(folder: Path, tmp_path: Path, kind: str) -> None:
    rows = [{"path": f"dog/{n:02d}.png", "caption": f"dog, number {n}", "label": "dog"} for n in (2, 4, 8)]
    table = folder / f"t.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["path", "caption", "label"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = pack(table, tmp_path / "out", shuffle_seed=None)
    reader = Reader(manifest)
    captions = [reader.read(0, row, [("txt",)])[0][1].decode() for row in range(3)]
    assert captions == [row["caption"] for row in rows] and manifest.classes == ("dog",)


def spoil_picture(folder: Path) -> None:
    (folder / "dog" / "02.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_picture, "02.png: bad picture"),
        (
            lambda folder: (folder / "x.png").write_bytes(b""),
            "pictures beside class folders, for instance x.png",
        ),
        (lambda folder: (folder / "bird").mkdir(), "bird: a class folder without pictures"),
    ],
)
def test_bad_input_is_named_and_nothing_is_published(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object], named: str
) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=named):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tables_without_use_are_refused(tmp_path: Path) -> None:
    for name, content, named in (
        ("a.csv", "name,label\nx.png,1\n", "no column of paths; its columns are name, label"),
        ("b.csv", "path\n", "a table without rows"),
        ("c.csv", "path\ngone.png\n", "no such picture"),
        ("d.jsonl", "[1]\n", "can't be read as jsonl"),
        ("e.csv", "path,label\na.png,\n", "row 1: its label is empty"),
        ("f.jsonl", '{"path": "a.png", "label": null}\n', "row 1: its label is empty"),
        ("g.parquet", "no parquet", "can't be read as parquet"),
        ("f.txt", "x", "a table ends in"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=named):
            pack(tmp_path / name, tmp_path / "out")
    with pytest.raises(DataError, match="no such folder or table"):
        pack(tmp_path / "gone", tmp_path / "out")


def test_shards_of_others_are_indexed_where_they_lie(tmp_path: Path) -> None:
    own = numbered_set(tmp_path / "shards", [3, 4, 5])
    calls: list[tuple[int, int]] = []
    pattern = str(tmp_path / "shards" / "shard-{000000..000002}.tar")
    manifest = indexing.index(
        [pattern], tmp_path / "list", classes=own.classes, progress=lambda *now: calls.append(now)
    )
    assert manifest.hash == own.hash and calls == [(1, 3), (2, 3), (3, 3)]
    globbed = indexing.index([str(tmp_path / "shards" / "*.tar")], tmp_path / "shards", classes=own.classes)
    assert globbed.hash == own.hash and globbed.shards[0].name == "shard-000000.tar"
    config = DataConfig(manifest=manifest.path, workers=0)
    with build_loader(
        config, [ViewSpec((8, 8), CenterCrop())], needs=frozenset({"views"}), seed=0, batch_size=12, rank=0,
        world_size=1, position=0,
    ) as batches:  # fmt: skip
        assert sorted(next(batches).index.tolist()) == list(range(12))


def test_an_interrupted_indexing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered_set(tmp_path / "shards", [3, 4, 5])
    read: list[str] = []
    real = indexing.survey

    def counted(path: Path, split: str) -> object:
        read.append(path.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(indexing, "survey", counted)
    patterns = [str(tmp_path / "shards" / "*.tar")]
    with pytest.raises(KeyboardInterrupt):
        indexing.index(patterns, tmp_path / "list")
    assert not (tmp_path / "list" / "manifest.json").exists()
    assert indexing.index(patterns, tmp_path / "list").samples == 12
    assert read == [f"shard-00000{n}.tar" for n in (0, 1, 2, 2)]
    assert {path.suffix for path in (tmp_path / "list" / "index").iterdir()} == {".idx"}


def test_patterns_that_name_nothing_or_twice(tmp_path: Path) -> None:
    for patterns, named in (
        ([str(tmp_path / "*.tar")], "matches no shard"),
        (["a.tar", "a.tar"], "named twice"),
        ([], "no shards"),
        ([str(tmp_path / "gone.tar")], "no such shard"),
    ):
        with pytest.raises(DataError, match=named):
            indexing.index(patterns, tmp_path / "list")


def test_planted_damage_is_all_found(tmp_path: Path) -> None:
    """A header, a cut, a payload byte, a missing shard, a bad picture, a wrong label, a key used twice."""
    good = [sample(n) for n in range(4)]
    bad = [*good, {**sample(1), "png": b"no picture"}, {**sample(2), "cls": b"77"}, {"txt": b""}]
    manifest = write_set(tmp_path, [good, good, good, good, bad], [str(n) for n in range(10)])
    assert len(verify(manifest).findings) == 4
    paths = [manifest.shard_path(n) for n in range(4)]
    header, cut, byte = (path.read_bytes() for path in paths[:3])
    second = min(manifest.index(0).row(1).offsets) - 512
    paths[0].write_bytes(header[:second] + b"?" + header[second + 1 :])
    paths[1].write_bytes(cut[:4000])
    place = max(manifest.index(2).row(3).offsets) + 30
    paths[2].write_bytes(byte[:place] + bytes([byte[place] ^ 1]) + byte[place + 1 :])
    paths[3].unlink()
    report = verify(manifest, processes=2)
    told = [str(finding) for finding in report.findings]
    assert not report.whole and json.loads(report.to_json())["whole"] is False
    for shard, reason in (
        (0, "damaged tar header"), (1, "truncated"), (2, "SHA-256"),
        (2, "sample '000011': field png: payload"), (3, "missing shard"), (4, "can't be decoded"),
        (4, "label '77'"), (4, "an empty caption"), (4, "no picture"),
    ):  # fmt: skip
        assert any(f"shard-{shard:06d}.tar" in line and reason in line for line in told), (
            shard,
            reason,
            told,
        )


def test_keys_used_twice_are_found(tmp_path: Path) -> None:
    manifest = numbered_set(tmp_path, [2, 2])
    paths = [str(manifest.shard_path(0)), str(manifest.shard_path(1))]
    other = numbered_set(tmp_path / "other", [1, 1])
    both = indexing.index([*paths, str(other.shard_path(1))], tmp_path / "both", classes=other.classes)
    assert [str(finding) for finding in verify(both).findings] == [
        f"{both.shards[2].name}: sample '000001': its key is also in {both.shards[0].name}"
    ]


def test_stats_count(tmp_path: Path) -> None:
    found = stats(numbered_set(tmp_path, [25, 15]))
    assert (found.samples, found.shards, found.looked_at) == (40, 2, 40)
    assert (found.shard_samples[0], found.shard_samples[-1]) == (15, 25)
    assert found.fields["cls"].total == 40 and found.fields["png"].samples == 40
    assert found.labels == {str(label): 4 for label in range(10)} and set(found.heights) == {12}
