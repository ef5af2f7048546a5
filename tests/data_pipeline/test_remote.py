"""Shards behind a URL: one download a node, whatever the server does, in bounded space."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError
from data_pipeline import indexing
from data_pipeline.cache import Cache, CacheConfig
from data_pipeline.config import DataConfig
from data_pipeline.load import Loader, build_loader
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.remote import FetchError, fetch, size_of
from data_pipeline.types import CenterCrop, ViewSpec
from data_pipeline.verify import verify
from tests.data_pipeline.server import faulty_server
from tests.data_pipeline.sets import numbered_set
from tests.places import FullDisk

VIEW = ViewSpec((8, 8), CenterCrop(1.0), flip=0)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return numbered_set(tmp_path_factory.mktemp("set"), [6] * 8)


def remote_copy(local: Manifest, url: str, directory: Path) -> Manifest:
    shards = tuple(Shard(f"{url}/{s.name}", s.samples, s.bytes, s.sha256) for s in local.shards)
    directory.mkdir()
    (directory / "index").symlink_to(local.directory / "index")
    Manifest(directory, shards, local.fields, local.classes).save()
    return Manifest.load(directory)


def loader(manifest: Manifest, cache: CacheConfig | None, **changes: int) -> Loader:
    config = DataConfig(manifest=manifest.path, workers=changes.pop("workers", 0), cache=cache, streams=4)
    settings = {"seed": 0, "batch_size": 12, "rank": 0, "world_size": 1, "position": 0} | changes
    return build_loader(config, [VIEW], needs=frozenset({"views", "target"}), **settings)


@pytest.mark.parametrize("fault", ["reset", "error", "short", "wrong", "stall"])
def test_a_bad_answer_is_asked_again(local: Manifest, tmp_path: Path, fault: str) -> None:
    shard, waits = local.shards[0], list[float]()
    with faulty_server(local.directory, lambda _, n: fault if n <= 2 else None) as server:
        url = f"{server.url}/{shard.name}"
        got = fetch(
            url, tmp_path / "s", size=shard.bytes, sha256=shard.sha256, wait=waits.append, timeout=0.3
        )
        assert got == shard.bytes and server.asked[shard.name] == 3 and waits == [0.5, 1.0]
    assert (tmp_path / "s").read_bytes() == local.shard_path(0).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("fault", "named"), [("short", "after 6 attempts"), ("wrong", "checksum differs"), (None, "no such file")]
)
def test_what_cant_be_had_is_named_and_leaves_nothing(
    local: Manifest, tmp_path: Path, fault: str | None, named: str
) -> None:
    shard = local.shards[0]
    with faulty_server(local.directory, lambda *_: fault) as server:
        url = f"{server.url}/{shard.name if fault else 'gone.tar'}"
        with pytest.raises(FetchError, match=named) as caught:
            fetch(url, tmp_path / "s", size=shard.bytes, sha256=shard.sha256, wait=lambda _: None)
    assert url in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "told", "asked"),
    [
        ("404", "missing shard: its server has no such file", 1),
        ("410", "missing shard: its server has no such file", 1),
        ("401", "its server refuses access (401 Unauthorized)", 1),
        ("403", "its server refuses access (403 Forbidden)", 1),
        ("418", "its server answers 418", 1),
        ("429", "can't be fetched after 6 attempts: its server is busy (429 Too Many Requests)", 6),
        ("500", "can't be fetched after 6 attempts: its server is busy (500 Internal Server Error)", 6),
        ("503", "can't be fetched after 6 attempts: its server is busy (503 Service Unavailable)", 6),
        ("599", "can't be fetched after 6 attempts: its server is busy (599)", 6),
    ],
)
def test_missing_forbidden_and_busy_are_told_apart(
    local: Manifest, tmp_path: Path, fault: str, told: str, asked: int, caplog: pytest.LogCaptureFixture
) -> None:
    shard = local.shards[0]
    with faulty_server(local.directory, lambda *_: fault, lambda *_: fault) as server:
        url = f"{server.url}/{shard.name}"
        for ask in (
            lambda waits: fetch(url, tmp_path / "s", wait=waits.append),
            lambda waits: size_of(url, waits.append),
        ):
            waits: list[float] = []
            server.asked.clear()
            caplog.clear()
            with pytest.raises(FetchError) as caught:
                ask(waits)
            assert str(caught.value).startswith(f"{url}: {told}") and "\n" not in str(caught.value)
            assert server.asked[shard.name] == asked and waits == [0.5, 1, 2, 4, 8][: asked - 1]
            words = [record.getMessage() for record in caplog.records]
            assert len(words) == asked - 1 and all(
                url in word and "trying again in" in word for word in words
            )
    assert list(tmp_path.iterdir()) == []


def test_a_server_out_of_reach_is_tried_again_and_named_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/x.tar"
        waits: list[float] = []
        with pytest.raises(FetchError, match="after 6 attempts: its server can't be reached"):
            fetch(url, tmp_path / "s", wait=waits.append)
        assert len(waits) == 5 and "trying again in 8 s (attempt 6 of 6)" in caplog.text
        with pytest.raises(FetchError, match="its server can't be reached"):
            size_of(url, wait=lambda _: None)


def test_a_busy_server_is_waited_for_as_long_as_it_asks(local: Manifest, tmp_path: Path) -> None:
    shard, waits = local.shards[0], list[float]()
    asks = {1: "429 7", 2: "503 100000", 3: "503 soon"}
    with faulty_server(local.directory, lambda _, n: asks.get(n), lambda *_: "503") as server:
        fetch(f"{server.url}/{shard.name}", tmp_path / "s", sha256=shard.sha256, wait=waits.append)
    assert waits == [7, 60, 2]


def test_indexing_verifying_and_training_outlast_a_busy_server(
    local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard's first answers are 503; nothing of it is called missing or damaged."""
    monkeypatch.setattr("data_pipeline.remote._FIRST_WAIT", 0.01)
    busy = lambda _, n: "503" if n % 3 else None  # noqa: E731
    with faulty_server(local.directory, busy, lambda _, n: "503" if n == 1 else None) as server:
        patterns = [server.url + "/shard-{000000..000007}.tar"]
        assert indexing.index(patterns, tmp_path / "list", classes=local.classes).hash == local.hash
        remote = remote_copy(local, server.url, tmp_path / "remote")
        assert verify(remote).whole
        cache = CacheConfig(directory=tmp_path / "cache")
        with loader(local, None) as plain, loader(remote, cache) as batches:
            assert next(batches).index.tolist() == next(plain).index.tolist()


def test_a_server_that_stays_busy_is_no_damage(
    local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.remote._FIRST_WAIT", 0.001)
    with faulty_server(local.directory, lambda *_: "503", lambda *_: "503") as server:
        remote = remote_copy(local, server.url, tmp_path / "remote")
        told = [str(finding) for finding in verify(remote).findings]
        cache = CacheConfig(directory=tmp_path / "cache")
        with loader(remote, cache) as batches, pytest.raises(FetchError, match="its server is busy"):
            next(batches)
    assert told and all("its server is busy (503" in line and "missing" not in line for line in told)


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_is_no_fault_of_the_server(local: Manifest, tmp_path: Path, at: int) -> None:
    shard, waits = local.shards[0], list[float]()
    with faulty_server(local.directory) as server:
        url = f"{server.url}/{shard.name}"
        with FullDisk(tmp_path / "kept", at) as disk, pytest.raises(DataError) as caught:
            fetch(url, tmp_path / "kept" / "s", wait=waits.append)
        assert disk.calls > at and "No space left" in str(caught.value) and str(tmp_path) in str(caught.value)
        assert server.asked[shard.name] == 1 and waits == []
    assert not any(tmp_path.glob("kept/*"))


def test_the_loader_reads_remote_shards_as_local_ones(local: Manifest, tmp_path: Path) -> None:
    with faulty_server(local.directory, lambda _, n: "error" if n == 1 else None) as server:
        remote = remote_copy(local, server.url, tmp_path / "remote")
        assert remote.hash == local.hash
        cache = CacheConfig(directory=tmp_path / "cache")
        with loader(local, None) as plain, loader(remote, cache) as batches:
            for _ in range(8):
                assert next(batches).index.tolist() == next(plain).index.tolist()
        with loader(local, None) as plain, loader(remote, cache, workers=2) as batches:
            expected = next(plain)
            assert (next(batches).views[0] == expected.views[0]).all()
        assert set(server.served.values()) == {1} and len(server.served) == 8


def test_many_readers_download_once(local: Manifest, tmp_path: Path) -> None:
    with faulty_server(local.directory) as server:
        remote = remote_copy(local, server.url, tmp_path / "remote")
        found: list[Path] = []

        def locate() -> None:
            cache = Cache(CacheConfig(directory=tmp_path / "cache"))
            found.extend(cache.locate(shard) for shard in remote.shards)

        threads = [threading.Thread(target=locate) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 48 and set(server.asked.values()) == {1}


def test_the_cache_stays_within_its_bound(local: Manifest, tmp_path: Path) -> None:
    size = max(shard.bytes for shard in local.shards)
    config = CacheConfig(directory=tmp_path / "cache", gigabytes=3.5 * size / 1e9)
    with faulty_server(local.directory) as server:
        remote = remote_copy(local, server.url, tmp_path / "remote")
        cache = Cache(config)
        for number in (0, 1, 2, 0, 3):
            assert cache.locate(remote.shards[number]).stat().st_size == remote.shards[number].bytes
            assert sum(path.stat().st_size for path in config.directory.glob("*.tar")) <= 3.5 * size
        kept = {number for number in range(8) if cache.path(remote.shards[number]).exists()}
        assert kept == {0, 2, 3}  # 1 was used longest ago


def test_a_cache_that_cant_work_is_refused_up_front(local: Manifest, tmp_path: Path) -> None:
    remote = remote_copy(local, "http://127.0.0.1:1", tmp_path / "remote")
    with pytest.raises(ConfigError, match=r"data.cache: .* has shards behind URLs"):
        loader(remote, None)
    with pytest.raises(ConfigError, match=r"data.cache.gigabytes: found 1e-06, but the shards read"):
        loader(remote, CacheConfig(directory=tmp_path / "cache", gigabytes=1e-6))


def test_remote_shards_are_indexed(local: Manifest, tmp_path: Path) -> None:
    with faulty_server(local.directory) as server:
        patterns = [server.url + "/shard-{000000..000007}.tar"]
        made = indexing.index(patterns, tmp_path / "list", classes=local.classes)
        assert made.hash == local.hash and made.shards[3].name == f"{server.url}/shard-000003.tar"
        (local.directory / "bad.tar").write_bytes(local.shard_path(0).read_bytes()[:3000])
        with pytest.raises(DataError, match=f"{server.url}/bad.tar: truncated"):
            indexing.index([f"{server.url}/bad.tar"], tmp_path / "bad")
        (local.directory / "bad.tar").unlink()


def test_remote_shards_are_verified_where_they_lie(local: Manifest, tmp_path: Path) -> None:
    served = numbered_set(tmp_path / "served", [6] * 8)
    with faulty_server(served.directory, lambda _, n: "reset" if n == 1 else None) as server:
        remote = remote_copy(local, server.url, tmp_path / "remote")
        report = verify(remote, processes=2)
        assert report.whole and (report.samples, report.shards) == (48, 8)
        byte, cut, gone = (served.shard_path(number) for number in (1, 4, 6))
        place = max(local.index(1).row(3).offsets) + 30
        data = byte.read_bytes()
        byte.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        cut.write_bytes(cut.read_bytes()[:4000])
        gone.unlink()
        told = [str(finding) for finding in verify(remote, processes=2).findings]
    for number, reason in (
        (1, "changed shard: its SHA-256"), (1, "sample '000009': field png: payload differs"),
        (4, "truncated shard"), (6, "missing shard: its server has no such file"),
    ):  # fmt: skip
        assert any(f"{server.url}/shard-{number:06d}.tar: {reason}" in line for line in told), (reason, told)
    assert {number for line in told for number in range(8) if f"-{number:06d}.tar" in line} == {1, 4, 6}
