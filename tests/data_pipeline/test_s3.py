"""Shards in an S3 bucket, served by moto; skipped where the extra `dev` isn't whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline import indexing
from data_pipeline.cache import CacheConfig
from data_pipeline.config import DataConfig
from data_pipeline.load import build_loader
from data_pipeline.types import CenterCrop, ViewSpec
from tests.data_pipeline.sets import numbered_set

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the S3 packages are not ours


def test_a_bucket_is_indexed_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = numbered_set(tmp_path / "local", [6, 6])
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for number in (0, 1):
            client.upload_file(str(local.shard_path(number)), "shards", f"set/{local.shards[number].name}")
        manifest = indexing.index(["s3://shards/set/shard-*.tar"], tmp_path / "list", classes=local.classes)
        assert manifest.hash == local.hash and manifest.shards[0].name == "s3://shards/set/shard-000000.tar"
        cache = CacheConfig(directory=tmp_path / "cache")
        config = DataConfig(manifest=manifest.path, workers=0, cache=cache)
        with build_loader(
            config, [ViewSpec((8, 8), CenterCrop())], needs=frozenset({"views"}), seed=0, batch_size=12,
            rank=0, world_size=1, position=0,
        ) as batches:  # fmt: skip
            assert sorted(next(batches).index.tolist()) == list(range(12))
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    finally:
        server.stop()
