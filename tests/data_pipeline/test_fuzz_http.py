"""Whatever a server answers, a shard is whole or a line says why not: statuses, headers, lengths, bodies.

And JPEGs changed marker by marker, which random bytes seldom reach. Few cases here, many under make torture.
"""

from __future__ import annotations

import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline.decode import DecodeError, decode
from data_pipeline.indexing import index
from data_pipeline.manifest import Manifest
from data_pipeline.remote import FetchError, fetch, size_of
from tests.data_pipeline.sets import encoded, numbered_set, photograph
from tests.data_pipeline.test_fuzz import TORTURE

pytestmark = [pytest.mark.torture] if TORTURE else []


def fuzz(few: int, many: int) -> settings:
    count = many if TORTURE else few
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


class RawServer:
    """Sends prepared bytes as the answer to every request, then closes; the last answer again and again."""

    def __init__(self) -> None:
        self.answers: list[bytes] = [b""]
        self.asked = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/shard.tar"

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                try:
                    while b"\r\n\r\n" not in (request := connection.recv(65536)) and request:
                        continue
                    answer = self.answers[min(self.asked, len(self.answers) - 1)]
                    self.asked += 1
                    head, _, _ = answer.partition(b"\r\n\r\n")
                    connection.sendall(head + b"\r\n\r\n" if request.startswith(b"HEAD") else answer)
                except OSError:
                    continue


@contextmanager
def raw_server() -> Iterator[RawServer]:
    server = RawServer()
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.socket.shutdown(socket.SHUT_RDWR)
        server.socket.close()
        thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[RawServer]:
    with raw_server() as server:
        yield server


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return numbered_set(tmp_path_factory.mktemp("set"), [3])


TEXT = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=12)
HEADERS = st.sampled_from(
    ["Content-Length", "Content-Type", "Transfer-Encoding", "Content-Encoding", "Retry-After",
     "Content-Range", "Accept-Ranges", "Connection", "ETag"]
)  # fmt: skip
VALUES = st.one_of(
    TEXT,
    st.integers(-2, 1 << 70).map(str),
    st.sampled_from(["chunked", "gzip", "br", "identity", "close", "keep-alive", "bytes 0-9/10"]),
)


@st.composite
def answers(draw: st.DrawFn, whole: bytes) -> bytes:
    """A status line, some headers and some of the body; now and then no HTTP at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    status = draw(st.sampled_from([200] * 4 + [204, 206, 301, 304, 400, 403, 404, 416, 429, 500, 503]))
    body = whole
    match draw(st.sampled_from(["whole", "whole", "cut", "longer", "changed", "none"])):
        case "cut":
            body = whole[: draw(st.integers(0, len(whole)))]
        case "longer":
            body = whole + draw(st.binary(min_size=1, max_size=600))
        case "changed":
            at = draw(st.integers(0, len(whole) - 1))
            body = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        case "none":
            body = b""
    lines = [f"HTTP/1.{draw(st.integers(0, 1))} {status} {draw(TEXT)}"]
    if draw(st.booleans()):
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{draw(HEADERS)}: {draw(VALUES)}" for _ in range(draw(st.integers(0, 2)))]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


# A connection whose answer isn't HTTP is left by aiohttp to the garbage collector, which closes it.
left_to_collect = pytest.mark.filterwarnings(
    "ignore:Unclosed connection:ResourceWarning",
    "ignore:Exception ignored in.*Connection.__del__:pytest.PytestUnraisableExceptionWarning",
)


@left_to_collect
@fuzz(40, 1_000)
@given(data=st.data())
def test_answers(served: RawServer, manifest: Manifest, tmp_path: Path, data: st.DataObject) -> None:
    """What is fetched is what the manifest says, whatever came before it; else our own error, and no file."""
    whole, shard = manifest.shard_path(0).read_bytes(), manifest.shards[0]
    served.answers = data.draw(st.lists(answers(whole), min_size=1, max_size=3))
    served.asked, target, waits = 0, tmp_path / "kept" / "s", list[float]()
    try:
        fetch(served.url, target, size=shard.bytes, sha256=shard.sha256, wait=waits.append, timeout=2)
    except FetchError as error:
        assert str(error).startswith(served.url) and "\n" not in str(error)
        assert not target.exists()
    else:
        assert target.read_bytes() == whole
        target.unlink()
    assert len(waits) <= 5 and all(0 < pause <= 60 for pause in waits)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []
    served.asked = 0
    try:
        size_of(served.url, wait=lambda _: None)
    except FetchError as error:
        assert "\n" not in str(error)


@left_to_collect
@fuzz(6, 1_000)
@given(data=st.data())
def test_shards_indexed_from_any_server(
    served: RawServer, manifest: Manifest, tmp_path: Path, data: st.DataObject
) -> None:
    """Without a checksum to hold it against: a whole set or a line, nothing published in between."""
    whole = manifest.shard_path(0).read_bytes()
    served.answers, served.asked = [data.draw(answers(whole))], 0
    out = Path(tempfile.mkdtemp(dir=tmp_path)) / "out"  # of this example alone, drawn again or not
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr("data_pipeline.remote._FIRST_WAIT", 0.0)
        quick.setattr("data_pipeline.remote._LONGEST_WAIT", 0.0)
        try:
            made = index([served.url], out)
        except DataError as error:
            assert served.url in str(error) and "\n" not in str(error)
            assert not (out / "manifest.json").exists()
        else:
            assert made.samples == Manifest.load(out).samples > 0


JPEGS = [
    encoded(photograph(40, 33, number), "JPEG", **options)
    for number, options in enumerate(
        [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}]
    )
]


@st.composite
def marked(draw: st.DrawFn) -> bytes:
    """A JPEG whose segments are dropped, doubled, swapped, cut, given other codes, lengths or company."""
    data = draw(st.sampled_from(JPEGS))
    cuts = [0, *[found.start() for found in re.finditer(rb"\xff[^\x00\xff]", data)], len(data)]
    parts = [data[start:end] for start, end in pairwise(cuts) if end > start]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(parts) - 1))
        junk = draw(st.one_of(st.binary(max_size=30), st.integers(1, 5000).map(bytes)))
        match draw(
            st.sampled_from(["drop", "double", "swap", "cut", "code", "length", "before", "within", "set"])
        ):
            case "drop":
                del parts[at]
                parts = parts or [b""]
            case "double":
                parts.insert(at, parts[at])
            case "swap":
                other = draw(st.integers(0, len(parts) - 1))
                parts[at], parts[other] = parts[other], parts[at]
            case "cut":
                parts[at] = parts[at][: draw(st.integers(0, len(parts[at])))]
            case "code":
                parts[at] = parts[at][:1] + bytes([draw(st.integers(0, 255))]) + parts[at][2:]
            case "length":
                parts[at] = parts[at][:2] + draw(st.integers(0, 65535)).to_bytes(2, "big") + parts[at][4:]
            case "before":
                parts.insert(at, junk)
            case "within":
                parts[at] = parts[at][:4] + junk + parts[at][4:]
            case "set" if len(parts[at]) > 4:
                place = draw(st.integers(2, min(len(parts[at]) - 1, 40)))
                parts[at] = parts[at][:place] + bytes([draw(st.integers(0, 255))]) + parts[at][place + 1 :]
    return b"".join(parts)


@fuzz(200, 20_000)
@given(data=marked())
def test_jpeg_markers(data: bytes) -> None:
    try:
        pixels = decode(data, max_pixels=1_000_000)
    except DecodeError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
