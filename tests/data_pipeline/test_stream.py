"""Stream mode reads what webdataset reads, from a training config, and runs no command unasked."""

from __future__ import annotations

import json
import logging
import shlex
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError, DataError
from configs.loading import validate
from data_pipeline.config import DataConfig
from data_pipeline.facts import facts_of
from data_pipeline.load import build_loader
from data_pipeline.shards import write_shard
from data_pipeline.stream import StreamLoader
from data_pipeline.tokenize import train
from data_pipeline.types import Batch, CenterCrop, ViewSpec
from tests.data_pipeline.server import faulty_server
from tests.data_pipeline.sets import numbered_set, numbers_in, sample, write_set

VIEW = ViewSpec((12, 12), CenterCrop(1.0), flip=0)


def config(shards: list[str], *, shell: bool = False, samples: int = 10, **more: object) -> DataConfig:
    stream = {"shards": shards, "samples": samples, "shuffle": 5, "allow_shell": shell}
    return validate({"stream": stream, "max_broken": 0, **more}, DataConfig, "a.yaml")


def loader(data: DataConfig, **changes: object) -> StreamLoader:
    values = {"needs": frozenset({"views", "target"}), "seed": 1, "batch_size": 6, "rank": 0, "world_size": 1}
    made = build_loader(data, [VIEW], **(values | {"position": 0} | changes))  # type: ignore[arg-type]
    assert isinstance(made, StreamLoader)
    return made


def batches(shards: list[str], count: int, *, shell: bool = False, **changes: object) -> list[Batch]:
    with loader(config(shards, shell=shell), **changes) as found:
        return list(islice(found, count))


def shown(found: list[Batch]) -> list[int]:
    return [number for batch in found for number in numbers_in(batch.views[0].numpy())]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """24 numbered samples in 4 shards."""
    root = tmp_path_factory.mktemp("stream")
    numbered_set(root, [6, 6, 6, 6])
    return [str(root / "shard-{000000..000003}.tar")]


def test_every_sample_comes_and_ranks_share_the_shards(shards: list[str]) -> None:
    whole = batches(shards, 4)
    assert Counter(shown(whole)) == dict.fromkeys(range(24), 1)
    assert all(batch.target is not None and batch.views[0].shape == (6, 3, 12, 12) for batch in whole)
    assert torch.cat([batch.index for batch in whole]).tolist() == list(range(24))
    parts = [batches(shards, 4, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(shown(parts[0]) + shown(parts[1])) == list(range(24))
    counted = [int(i) for part in parts for batch in part for i in batch.index]
    assert sorted(counted) == list(range(24))
    assert sorted(shown(batches(shards, 12))) == sorted(list(range(24)) * 3)


def test_going_on_starts_anew_and_says_so(shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batches(shards, 1)
        assert not caplog.messages
        with loader(config(shards), position=12) as again:
            batch = next(again)
    assert "data.stream: starts anew at sample 12: samples seen before may come again" in caplog.text
    assert batch.index.tolist() == list(range(12, 18)) and again.position == 18
    assert again.metrics() == {
        "source_0_samples": 18, "source_0_epochs": 1.8, "broken_samples": 0, "worker_restarts": 0,
    }  # fmt: skip
    beginnings = {tuple(shown(batches(shards, 1, position=position))) for position in (0, 6, 12, 18)}
    assert len(beginnings) > 1  # not the same samples after every restart


def test_its_facts_come_from_its_description(shards: list[str]) -> None:
    facts = facts_of(config(shards, samples=1000))
    assert facts.samples == 1000 and facts.manifests == ()
    assert facts.hash == facts_of(config(shards, samples=1000)).hash != facts_of(config(shards)).hash
    facts.require(frozenset({"views"}), world_size=4)
    with pytest.raises(ConfigError, match=r"data.stream.shards: 4 shards for 5 ranks"):
        facts.require(frozenset({"views"}), world_size=5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "set one of manifest"),
        ({"manifest": "m", "stream": {"shards": ["a.tar"], "samples": 1}}, "set one of manifest"),
        ({"stream": {"shards": ["a.tar"], "samples": 1}, "demo": {"name": "digits"}}, "demo is for indexed"),
        ({"stream": {"shards": ["a.tar"], "samples": 1}, "also": [{"manifest": "m"}]}, "also is for indexed"),
        ({"stream": {"shards": [], "samples": 1}}, "stream.shards: "),
        (
            {"stream": {"shards": ["pipe:ls"], "samples": 1}},
            "'pipe:ls' runs a shell command; set allow_shell",
        ),
    ],
)
def test_a_config_has_either_and_no_command_unasked(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        validate(changes, DataConfig, "a.yaml")


def test_commands_are_run_when_allowed(tmp_path: Path) -> None:
    numbered_set(tmp_path, [6, 6])
    command = f"pipe:cat {shlex.quote(str(tmp_path))}/shard-{{000000..000001}}.tar"
    assert sorted(shown(batches([command], 2, shell=True))) == list(range(12))
    with pytest.raises(DataError, match="can't be streamed"):
        batches(["pipe:false"], 1, shell=True)


def test_urls_are_streamed_and_never_reach_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbered_set(tmp_path / "set", [6, 6])
    with faulty_server(tmp_path / "set", lambda path, n: None) as server:
        urls = [f"{server.url}/shard-{{000000..000001}}.tar"]
        assert sorted(shown(batches(urls, 2))) == list(range(12))
        with pytest.raises(DataError, match="can't be streamed"):
            batches([f"{server.url}/none'; touch hacked; '.tar"], 1)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"png": b"nothing", "cls": b"1"}, "shard-000000.tar: sample '000000': field png: can't be decoded"),
        ({"txt": b"only"}, "missing; the sample has txt"),
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


def test_broken_samples_are_passed_over_and_written_down(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, [[sample(0), {"png": b"no", "cls": b"1"}, sample(2)]])
    data = config([str(manifest.shard_path(0))], max_broken=0.001)
    with loader(data, quarantine=tmp_path / "q.jsonl") as found:
        assert sorted(shown([next(found)])) == [0, 0, 0, 2, 2, 2]
        with pytest.raises(DataError, match=r"data.max_broken: 11 of"):
            for batch in found:
                assert 1 not in numbers_in(batch.views[0].numpy())
    (line,) = (tmp_path / "q.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "000001"


def test_a_stream_without_samples_ends(tmp_path: Path) -> None:
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match="no sample in any of them"):
        batches([str(tmp_path / "empty.tar")], 1)


def test_captions_come_as_tokens(tmp_path: Path) -> None:
    captioned = [{**sample(n), "txt": f"number {n}".encode()} for n in range(4)]
    manifest = write_set(tmp_path, [captioned])
    (tmp_path / "t.json").write_bytes(train([f"number {n}" for n in range(4)], 300))
    data = config([str(manifest.shard_path(0))], tokenizer={"path": tmp_path / "t.json", "context": 8})
    with loader(data, needs=frozenset({"views", "tokens"}), batch_size=4) as found:
        batch = next(found)
    assert batch.tokens is not None and batch.tokens.shape == (4, 8)
    assert len({tuple(row) for row in batch.tokens.tolist()}) == 4 and batch.target is None
