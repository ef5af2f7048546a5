"""Whatever bytes come in, only our own errors come out: no crash, no hang, no file anywhere.

500 inputs here, 10,000 and more under make torture.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline.captions import drawn, places, texts
from data_pipeline.decode import DecodeError, decode
from data_pipeline.index import Index, index_shard, sealed
from data_pipeline.load import sequential
from data_pipeline.manifest import Manifest, Shard, save_index
from data_pipeline.patterns import expanded
from data_pipeline.read import Reader
from data_pipeline.shards import write_shard
from data_pipeline.tokenize import Tokenizer, TokenizerConfig, train
from data_pipeline.types import CenterCrop, ViewSpec
from tests.data_pipeline.sets import encoded, numbered_set, photograph, sample

TORTURE = os.environ.get("KEEL_TORTURE") == "1"
MANY = 3000 if TORTURE else 125
pytestmark = [pytest.mark.torture] if TORTURE else []  # so that make torture runs these at length
FUZZ = settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with some bytes set, runs repeated, removed or blanked, or the end cut off."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        length = draw(st.integers(1, 600))
        match draw(st.sampled_from(["set", "set", "bits", "blank", "drop", "repeat", "cut"])):
            case "set":
                new = draw(st.binary(min_size=1, max_size=12))
                out[at : at + len(new)] = new
            case "bits" if out:
                out[at] ^= 1 << draw(st.integers(0, 7))
            case "blank":
                out[at : at + length] = bytes(len(out[at : at + length]))
            case "drop":
                del out[at : at + length]
            case "repeat":
                out[at:at] = out[at : at + length]
            case "cut":
                del out[at:]
    return bytes(out)


PICTURES = [
    encoded(photograph(24, 31), "JPEG"),
    encoded(photograph(24, 31), "JPEG", progressive=True),
    encoded(photograph(24, 31, 1)),
    encoded(photograph(24, 31, 2), "WEBP"),
    encoded(photograph(24, 31, 3), "GIF"),
]


@FUZZ
@given(data=st.sampled_from(PICTURES).flatmap(mutations))
def test_pictures(data: bytes) -> None:
    try:
        pixels = decode(data, max_pixels=1_000_000)
    except DecodeError as error:
        assert "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return numbered_set(tmp_path_factory.mktemp("set"), [3, 2])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    content = train(["a caption", "another caption"], 300)
    return Tokenizer(TokenizerConfig(path=Path("t.json"), context=16), content)


def read_all(manifest: Manifest) -> None:
    """Every sample through the loader, as an evaluation would."""
    for batch in sequential(manifest, ViewSpec((4, 4), CenterCrop()), batch_size=4):
        assert len(batch)


@FUZZ
@given(data=st.data())
def test_tars(manifest: Manifest, tmp_path: Path, data: st.DataObject) -> None:
    """A mutated tar indexed afresh, then read; and in the place of the one that was indexed."""
    folder = tmp_path / "fuzzed"
    folder.mkdir(exist_ok=True)
    path = folder / "shard.tar"
    path.write_bytes(data.draw(mutations(manifest.shard_path(0).read_bytes())))
    try:
        index, digest = index_shard(path)
        save_index(folder, index, digest)
        read_all(Manifest(folder, (Shard(path.name, len(index), index.shard_bytes, digest),), index.fields))
    except DataError as error:
        assert "shard" in str(error) and "\n" not in str(error)
    original = manifest.shards[0]
    save_index(folder, manifest.index(0), original.sha256)
    moved = Manifest(folder, (Shard(path.name, 3, original.bytes, original.sha256),), manifest.fields)
    if path.read_bytes() != manifest.shard_path(0).read_bytes():
        reader = Reader(moved)
        for row in range(3):
            try:
                found = reader.read(0, row, [("png",), ("cls",)])
            except DataError:
                continue
            assert [content for _, content in found] == list(sample(row).values())
        reader.close()
    assert {entry.name for entry in tmp_path.iterdir()} == {"fuzzed"}


@FUZZ
@given(data=st.data(), resealed=st.booleans())
def test_sidecars(manifest: Manifest, data: st.DataObject, resealed: bool) -> None:
    """Mutated, half of them with the checksum made right again, as a malicious file would have it."""
    whole = manifest.index(0).to_bytes()
    mutated = data.draw(mutations(whole[:-8] if resealed else whole))
    if resealed:
        mutated = sealed(mutated)
    try:
        index = Index.from_bytes(mutated, "x.idx")
    except DataError as error:
        assert str(error).startswith("x.idx: ")
        return
    assert len(index.keys()) == len(index)

    class Forged(Manifest):
        def index(self, number: int) -> Index:
            return index

    forged = Forged(manifest.directory, manifest.shards, manifest.fields, manifest.classes)
    reader = Reader(forged)
    for row in range(min(len(index), 10)):
        try:
            reader.read(0, row, [("png",), ("cls",)])
        except DataError:
            continue
    reader.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_captions_in_any_bytes(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Text and JSON mutated, or any value put in any place."""
    content = {"caption": data.draw(JSON), "deep": {"captions": data.draw(JSON)}}
    payload = json.dumps(content).encode()
    if data.draw(st.booleans()):
        payload = data.draw(mutations(payload))
    place = data.draw(
        st.sampled_from(places(["txt", "json", "json.caption", "json.deep.captions"], ["json", "txt"]))
    )
    try:
        caption = drawn(texts(place, payload), 0.5)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    row = tokenizer.encode(caption)
    assert len(row) == 16 and row.max() == tokenizer.end and (row == tokenizer.end).sum() == 1


@FUZZ
@given(data=st.data())
def test_manifests(manifest: Manifest, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes mutated, or any value put in any place."""
    text = manifest.path.read_bytes()
    if data.draw(st.booleans()):
        content = json.loads(text)
        place = content if data.draw(st.booleans()) else content["shards"][0]
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
        text = json.dumps(content).encode()
    else:
        text = data.draw(mutations(text))
    (tmp_path / "manifest.json").write_bytes(text)
    try:
        Manifest.load(tmp_path)
    except DataError as error:
        assert str(error).startswith(str(tmp_path))
        assert "\n" not in str(error)


def test_names_of_members_never_become_paths(tmp_path: Path) -> None:
    """Names that climb out of a folder are only names."""
    names = ["../../up", "/etc/passwd", "a/../../b", "~/.ssh/id"]
    path = tmp_path / "in" / "s.tar"
    write_shard(path, [(name.lstrip("/") or name, sample(n)) for n, name in enumerate(names)])
    index, digest = index_shard(path)
    save_index(path.parent, index, digest)
    before = sorted(tmp_path.rglob("*"))
    read_all(Manifest(path.parent, (Shard("s.tar", 4, index.shard_bytes, digest),), index.fields))
    assert sorted(tmp_path.rglob("*")) == before and len(index.keys()) == 4


@pytest.mark.parametrize(
    "name", ["pipe:touch hacked", "pipe:curl http://x/a.tar", "zip://a::http://b", "py://x"]
)
def test_no_commands_are_run(
    tmp_path: Path, manifest: Manifest, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"commands and chained URLs aren't run|unknown protocol"):
        expanded([name])
    content = json.loads(manifest.path.read_text())
    content["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"commands and chained URLs aren't run|unknown protocol"):
        Manifest.load(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_nothing_is_unpickled() -> None:
    """The pipeline unpickles only what its own processes send each other."""
    package = Path(__file__).parents[2] / "data_pipeline"
    users = {path.name for path in package.glob("*.py") if "import pickle" in path.read_text()}
    assert users == {"pool.py", "worker.py"}
