"""`keel data` end to end on small sets, and the audit of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import RunError
from configs.loading import dump, load
from data_pipeline.demo import DemoConfig, make
from data_pipeline.stream import StreamConfig
from launch.audit import audit_run
from launch.cli_data import app
from pretrain.config import RunConfig


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
