"""Captions from text and JSON to tokens in a batch: one drawn by the sample's seed, the same anywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError, DataError
from data_pipeline.captions import Place, drawn, places, texts
from data_pipeline.config import DataConfig
from data_pipeline.demo import DemoConfig
from data_pipeline.facts import facts_of, vocabulary_of
from data_pipeline.load import Loader, build_loader
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import make_missing, make_tokenizer
from data_pipeline.tokenize import TokenizerConfig, open_tokenizer, train
from data_pipeline.types import CenterCrop, ViewSpec
from tests.data_pipeline.sets import sample, write_set

VIEW = ViewSpec((7, 7), CenterCrop(1.0), flip=0.0)
CONTEXT = 9
NEEDS = frozenset({"views", "tokens", "index"})


def captioned(number: int) -> dict[str, bytes]:
    """Sample `number` says so, in four ways."""
    more = {"captions": [f"two {number}", "  ", f"three {number}"], "deep": {"en": f"four {number}"}, "n": 1}
    return {**sample(number), "txt": f"one {number}\n".encode(), "json": json.dumps(more).encode()}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("captions")
    made = write_set(root, [[captioned(n) for n in range(20)], [captioned(n) for n in range(20, 37)]])
    make_tokenizer(made, root / "tokenizer.json", 300, names=["txt", "json.captions", "json.deep.en"])
    return made


def config(manifest: Manifest, *captions: str, **changes: object) -> DataConfig:
    tokenizer = {"path": manifest.directory / "tokenizer.json", "context": CONTEXT}
    values = {
        "manifest": manifest.path,
        "tokenizer": tokenizer,
        "captions": captions or ("txt",),
        "window": 8,
    }
    return DataConfig.model_validate({"workers": 0, "max_broken": 0, **values, **changes})


def loader(settings: DataConfig, position: int = 0, rank: int = 0, world_size: int = 1) -> Loader:
    return build_loader(
        settings,
        [VIEW],
        needs=NEEDS,
        seed=5,
        batch_size=12,
        rank=rank,
        world_size=world_size,
        position=position,
    )


ALL = ("txt", "json.captions", "json.deep.en")


def test_one_of_a_samples_captions_comes_all_equally_often(manifest: Manifest) -> None:
    tokenizer = open_tokenizer(TokenizerConfig(path=manifest.directory / "tokenizer.json", context=CONTEXT))
    spoken = {
        tuple(tokenizer.encode(f"{word} {number}").tolist()): (word, number)
        for word in ("one", "two", "three", "four") for number in range(37)
    }  # fmt: skip
    words: Counter[str] = Counter()
    with loader(config(manifest, *ALL)) as batches:
        for _ in range(100):
            batch = next(batches)
            assert batch.tokens is not None and batch.tokens.shape == (12, CONTEXT)
            assert batch.tokens.dtype == torch.int64
            for row, index in zip(batch.tokens.tolist(), batch.index.tolist(), strict=True):
                word, number = spoken[tuple(row)]
                assert number == index
                words[word] += 1
    assert all(240 < count < 360 for count in words.values()) and len(words) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_are_the_same_from_any_rank_worker_and_start(manifest: Manifest, workers: int) -> None:
    with loader(config(manifest, *ALL)) as batches:
        through = [next(batches) for _ in range(4)]

    def rows(found: list) -> dict:  # type: ignore[type-arg]
        return {
            (int(i), int(s)): (tuple(t.tolist()), v.numpy().tobytes())
            for b in found for i, s, t, v in zip(b.index, b.seeds, b.tokens, b.views[0], strict=True)
        }  # fmt: skip

    parts = []
    for rank in range(3):
        with loader(config(manifest, *ALL, workers=workers), 24, rank, 3) as batches:
            parts += [next(batches) for _ in range(2)]
    assert rows(parts) == rows(through[2:])


def test_places_lead_into_fields_with_dots_in_their_names() -> None:
    fields = ("jpg", "json", "alt.json", "alt.txt")
    asked = ("txt", "json", "json.a.b", "alt.json.c", "alt.txt", "js")
    found = places(asked, fields)
    assert found == (Place("json"), Place("json", ("a", "b")), Place("alt.json", ("c",)), Place("alt.txt"))
    assert texts(found[0], b'["a", " b "]') == ["a", "b"] and texts(found[0], b'"a"') == ["a"]
    assert texts(found[1], b'{"a": {"b": "x"}}') == ["x"] and texts(found[1], b'{"a": 3}') == []
    assert texts(found[3], b" a\n") == ["a"] and texts(found[3], b" \n") == []
    assert [drawn("abc", chance) for chance in (0.0, 0.34, 0.999999)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("field", "payload", "named"),
    [
        ("txt", b" \n\t", "field txt: no caption, or only empty ones"),
        ("txt", b"\xff", "field txt: isn't UTF-8"),
        ("json", b"{", "field json: isn't JSON"),
        ("json", b'{"caption": "\\ud800"}', "field json: isn't text: half of a surrogate pair"),
        ("json", b"[" * 100_000, "field json: isn't JSON"),
        ("json", b'{"caption": 3}', "a caption is a text or a list of texts, found int"),
        ("json", b'{"caption": [null]}', "a caption is a text or a list of texts, found NoneType"),
        ("json", b'{"caption": null}', "field json: no caption, or only empty ones"),
        ("json", None, "field json: no caption, or only empty ones"),
    ],
)
def test_a_sample_without_a_caption_is_broken_and_replaced(
    manifest: Manifest, tmp_path: Path, field: str, payload: bytes | None, named: str
) -> None:
    samples = [{**sample(n), "txt": b"one", "json": b'{"caption": "one"}'} for n in range(6)]
    if payload is None:
        del samples[2][field]  # type: ignore[arg-type]
    else:
        samples[2][field] = payload
    made = write_set(tmp_path, [samples])
    place = "txt" if field == "txt" else "json.caption"
    tokenizer = {"path": manifest.directory / "tokenizer.json", "context": CONTEXT}
    settings = config(made, place, tokenizer=tokenizer)
    with pytest.raises(DataError, match=named), loader(settings) as batches:
        next(batches)
    with loader(settings.model_copy(update={"max_broken": 0.1})) as batches:
        batch = next(batches)
        assert batches.metrics()["broken_samples"] == 2
    assert 2 not in batch.index and batch.tokens is not None
    assert len({tuple(row) for row in batch.tokens.tolist()}) == 1


def test_what_can_never_work_is_refused_before_anything_starts(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer: is missing, and the objective reads captions"):
        facts_of(config(manifest, tokenizer=None)).require(NEEDS)
    with pytest.raises(ConfigError, match=r"data.captions: found text, but .* fields cls, json, png, txt"):
        facts_of(config(manifest, "text")).require(NEEDS)
    assert vocabulary_of(config(manifest)) == 300 and vocabulary_of(config(manifest, tokenizer=None)) is None


def test_the_tokenizer_is_part_of_a_datas_identity(manifest: Manifest, tmp_path: Path) -> None:
    before = facts_of(config(manifest)).identity
    other = tmp_path / "other.json"
    other.write_bytes((manifest.directory / "tokenizer.json").read_bytes() + b"\n")
    facts = facts_of(config(manifest, tokenizer={"path": other}))
    assert facts.identity["manifest_hash"] == before["manifest_hash"] == manifest.hash
    assert facts.identity["tokenizer_hash"] != before["tokenizer_hash"]
    assert str(other) in facts.place("tokenizer_hash")
    assert "tokenizer_hash" not in facts_of(config(manifest, tokenizer=None)).identity


def test_a_demo_makes_its_tokenizer(tmp_path: Path) -> None:
    demo = DemoConfig(name="shapes", samples=600, val_samples=5)
    settings = DataConfig(
        manifest=tmp_path / "d" / "train" / "manifest.json", demo=demo, workers=0,
        tokenizer=TokenizerConfig(path=tmp_path / "d" / "tokenizer.json", context=48, vocabulary=320),
    )  # fmt: skip
    make_missing(settings, tmp_path)
    made = (tmp_path / "d" / "tokenizer.json").read_bytes()
    with loader(settings) as batches:
        batch = next(batches)
    assert batch.tokens is not None and int(batch.tokens.max()) == 319
    assert (batch.tokens[:, -1] == 0).all() and len(np.unique(batch.tokens.numpy(), axis=0)) > 8
    make_missing(settings, tmp_path)
    assert (tmp_path / "d" / "tokenizer.json").read_bytes() == made
    assert Manifest.load(settings.manifest).classes[0] == "circle"


TYPOS = {
    "my-phtos/train/manifest.json": False,
    "data/photos/train/manifest.json": False,
    "run/../my-phtos/train/manifest.json": False,
    "run-2/data/shapes/train/manifest.json": False,
    "data/shapes/train/manifest.json": True,  # shared by the runs of a sweep
    "run/data/shapes/train/manifest.json": True,
}


@pytest.mark.parametrize("place", TYPOS)
def test_a_demo_isnt_made_at_a_mistyped_path(tmp_path: Path, place: str) -> None:
    demo = DemoConfig(name="shapes", samples=4, val_samples=2)
    settings = DataConfig(manifest=tmp_path / place, demo=demo)
    if TYPOS[place]:
        make_missing(settings, tmp_path / "run")
        assert (tmp_path / place).is_file()
        return
    with pytest.raises(ConfigError, match=r"data.manifest: .*: no such file, and demo data are only made in"):
        make_missing(settings, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["google/siglip", "tok.json", "run/../tok.json", "data/tok.json"])
def test_a_demos_tokenizer_isnt_made_at_a_mistyped_path(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = DataConfig(
        manifest=tmp_path / "run" / "data" / "train" / "manifest.json",
        demo=DemoConfig(name="shapes", samples=4, val_samples=2),
        tokenizer=TokenizerConfig(path=Path(place)),
    )
    with pytest.raises(ConfigError, match=r"data.tokenizer.path: .*: no such file, and a demo's tokenizer"):
        make_missing(settings, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []  # said before the data are made


def test_a_set_may_be_named_by_its_folder_beside_demo_settings(tmp_path: Path, manifest: Manifest) -> None:
    settings = DataConfig(manifest=manifest.directory, demo=DemoConfig(name="shapes"))
    make_missing(settings, tmp_path / "run")
    assert facts_of(settings).samples == manifest.samples and list(tmp_path.iterdir()) == []


def test_a_byte_order_mark_is_no_part_of_a_caption() -> None:
    [txt, json_caption] = places(["txt", "json.caption"], ["txt", "json"])
    assert texts(txt, b"\xef\xbb\xbfa dog") == ["a dog"]
    assert texts(json_caption, b'\xef\xbb\xbf{"caption": "a dog"}') == ["a dog"]


def test_a_tokenizers_folder_is_told_from_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; there is no tokenizer\.json in it"):
        open_tokenizer(TokenizerConfig(path=tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(train(["a dog", "a cat"], 300))
    with pytest.raises(ConfigError, match=f"is a folder; name the file in it: {tmp_path}/tokenizer.json"):
        open_tokenizer(TokenizerConfig(path=tmp_path))
    run = tmp_path / "run"
    (run / "hf").mkdir(parents=True)
    demo, manifest = DemoConfig(name="shapes", samples=4, val_samples=2), run / "data/train/manifest.json"
    settings = DataConfig(manifest=manifest, demo=demo, tokenizer=TokenizerConfig(path=run / "hf"))
    make_missing(settings, run)
    with pytest.raises(ConfigError, match="hf: is a folder"):
        facts_of(settings)


def test_only_some_of_a_large_set_may_be_read(manifest: Manifest, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    make_tokenizer(manifest, tmp_path / "t.json", 300, limit=5, progress=lambda *at: told.append(at))
    assert told[-1] == (5, 5)
    with pytest.raises(ConfigError, match=r"data.captions: found alt"):
        make_tokenizer(manifest, tmp_path / "t.json", 300, names=["alt"])
