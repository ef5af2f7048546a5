"""`keel data` end to end on small sets, and the audit of a run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import ConfigError, DataError, RunError
from configs.loading import dump, load
from data_pipeline.demo import DemoConfig, make
from data_pipeline.stream import StreamConfig
from launch.cli.data import app
from launch.runs.audit import audit_run
from pretrain.config import RunConfig
from tests.data_pipeline.server import faulty_server
from tests.data_pipeline.sets import numbered_set, sample, write_set
from tests.data_pipeline.test_remote import remote_copy


def keel(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def test_from_demo_data_to_a_broken_set(tmp_path: Path) -> None:
    said = keel("demo", "shapes", "--out", tmp_path / "d", "--samples", 30, "--val-samples", 10)
    assert "30 samples in 1 shards, 10 classes" in said
    train = tmp_path / "d" / "train"
    assert "30 samples" in keel("index", train / "shard-*.tar", "--out", tmp_path / "list", "--processes", 1)
    assert "all is well" in keel("verify", train, "--processes", 1)
    assert json.loads(keel("stats", train, "--json"))["samples"] == 30 and "quantiles" in keel("stats", train)
    keel("view", train, "--out", tmp_path / "sheet.png", "--count", 2)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    said = keel("tokenizer", train, "--to", tmp_path / "t.json", "--vocab", 270)
    assert "270 tokens, the end is 269" in said and (tmp_path / "t.json").is_file()
    assert "samples/s" in keel("bench", train, "--size", 16, "--workers", 0, "--seconds", 0.1)
    shard = train / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    assert "truncated shard" in keel("verify", train, "--processes", 1, code=2)
    assert json.loads(keel("verify", train, "--processes", 1, "--json", code=2))["whole"] is False


def test_a_runs_counts_are_held_against_its_order(tmp_path: Path) -> None:
    make(DemoConfig(name="digits"), tmp_path / "data")
    run = tmp_path / "run"
    manifest = tmp_path / "data" / "train" / "manifest.json"
    config = load("smoke/mae", RunConfig, [f"run.dir={run}", f"data.manifest={manifest}"])
    run.mkdir()
    (run / "config.yaml").write_text(dump(config))
    with pytest.raises(RunError, match="no metrics yet"):
        audit_run(run)
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"samples": 32}\n{"samples": 3000, "data/source_0_samples": 3000}\n{"samples": 30')
    (found,) = audit_run(run)
    assert (found.samples, found.seen, found.unique, found.repeated) == (1438, 3000, 1438, 1562)
    assert json.loads(keel("audit", run, "--json"))[0]["seen"] == 3000 and "1562" in keel("audit", run)
    metrics.write_text('{"samples": 3000, "data/source_0_samples": 2999}\n')
    with pytest.raises(RunError, match="data/source_0_samples: found 2999, but the order"):
        audit_run(run)
    stream = {"shards": [str(manifest.with_name("shard-000000.tar"))], "samples": 9}
    data = config.data.model_copy(update={"manifest": None, "demo": None, "stream": StreamConfig(**stream)})
    (run / "config.yaml").write_text(dump(config.model_copy(update={"data": data})))
    with pytest.raises(RunError, match=r"was trained on data.stream, which has no order"):
        audit_run(run)
    with pytest.raises(RunError, match="not a run folder"):
        audit_run(tmp_path)


def test_sets_behind_urls_are_counted_looked_at_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = numbered_set(tmp_path / "local", [6, 4, 5])
    with faulty_server(local.directory) as server:
        remote = remote_copy(local, server.url, tmp_path / "remote").path
        found = json.loads(keel("stats", remote, "--json", "--look-at", 7))
        assert (found["samples"], found["looked_at"], found["unusable"]) == (15, 7, 0)
        assert set(found["heights"]) == {12} and sum(found["labels"].values()) == 7
        assert json.loads(keel("stats", remote, "--json"))["looked_at"] == 15
        sheet, cache = tmp_path / "sheet.png", f"data.cache.directory={tmp_path / 'cache'}"
        with pytest.raises(ConfigError, match=r"name a folder to keep them in \(data.cache.directory=DIR"):
            keel("view", remote, "--out", sheet)
        keel("view", remote, cache, "data.image_size=32", "run.seed=3", "--out", sheet, "--count", 2)
        assert sheet.stat().st_size > 500
        timed = ("bench", remote, "--size", 16, "--workers", 0, "--seconds", 0.1, "--batch-size", 2)
        assert "samples/s" in keel(*timed, "--cache", tmp_path / "cache")
        with pytest.raises(ConfigError, match="keel data bench has --cache DIR"):
            keel(*timed)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("nonsense.setting=5", "nonsense: no such setting; known here: data, run"),
        ("data.max_pixel=5", "data.max_pixel: no such setting; did you mean max_pixels?"),
        ("run.dir=x", "run.dir: no such setting"),
        ("image_size", "an override reads path.to.setting=value"),
    ],
)
def test_a_sheet_of_a_set_takes_settings_of_data_and_no_others(
    tmp_path: Path, override: str, told: str
) -> None:
    manifest = numbered_set(tmp_path / "set", [3])
    with pytest.raises(ConfigError) as caught:
        keel("view", manifest.path, override, "--out", tmp_path / "sheet.png")
    assert told in str(caught.value) and not (tmp_path / "sheet.png").exists()


def test_what_cant_be_used_is_counted(tmp_path: Path) -> None:
    bad = {"png": b"nothing", "cls": b"1"}
    manifest = write_set(tmp_path / "set", [[sample(0), bad, {**sample(1), "cls": b"9" * 5000}]], ["a", "b"])
    found = json.loads(keel("stats", manifest.path, "--json"))
    assert (found["looked_at"], found["unusable"]) == (2, 1) and found["labels"] == {"a": 1, "9" * 40: 1}


def test_names_and_captions_are_any_bytes(tmp_path: Path) -> None:
    """Odd paths, keys, fields, labels and captions come through every command, as JSON that anybody reads."""
    odd = os.fsdecode(b"caf\xe9 'quoted' 100%")
    captions = [b"\xef\xbb\xbfa dog", b"caf\xe9", "山 👩‍👩‍👧 كلب".encode(), b"a\0b", b"x" * 9000]
    samples = [{**sample(n), "txt": text, odd: b"?"} for n, text in enumerate(captions)]
    manifest = write_set(tmp_path / odd, [samples], [odd, "grün", *"cdefghij"])
    for words in (("stats", manifest.path), ("verify", manifest.path, "--processes", 1)):
        done = CliRunner().invoke(app, [str(word) for word in (*words, "--json")], catch_exceptions=False)
        done.stdout_bytes.decode("ascii")
        assert json.loads(done.stdout_bytes)["samples"] == 5
    sheet = tmp_path / "sheet.png"  # what the terminal makes of odd names is tested with the program itself
    keel("view", manifest.path, "data.captions=[txt]", "--out", sheet, "--count", 5)
    assert sheet.stat().st_size > 500
    keel("tokenizer", manifest.path, "--to", tmp_path / "t.json", "--vocab", 280)


def test_places_are_looked_at_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer for which there is no room isn't made first."""
    monkeypatch.setattr("data_pipeline.prepare.train", lambda *_: pytest.fail("trained"))
    manifest = write_set(tmp_path / "set", [[{**sample(0), "txt": b"a dog"}]])
    (tmp_path / "file").write_text("")
    for to, told in (
        (tmp_path, "is a folder; name the file to write"),
        (tmp_path / "file" / "t.json", "File exists"),
        (Path("/proc/keel/t.json"), "/proc/keel"),
    ):
        with pytest.raises(DataError, match=told):
            keel("tokenizer", manifest.path, "--to", to)
