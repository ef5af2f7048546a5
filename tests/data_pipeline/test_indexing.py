"""`keel data index`: shards are what their whole names say, and what isn't taken is told."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import DataError
from data_pipeline import account, indexing, members
from data_pipeline.files import write_whole
from data_pipeline.index import Index
from data_pipeline.indexing import Fields, index
from data_pipeline.load import sequential
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.patterns import expanded
from data_pipeline.read import Reader
from data_pipeline.remote import FetchError
from data_pipeline.stats import stats
from data_pipeline.types import CenterCrop, ViewSpec
from data_pipeline.verify import verify
from tests.data_pipeline.sets import numbered_set, numbers_in, sample
from tests.data_pipeline.tars import Entry, tarred
from tests.places import FullDisk, unprivileged

TIME = (1_600_000_000, 1_600_000_000)


def pictures(path: Path, first: int, count: int = 2, key: str = "{:03d}") -> Path:
    """A shard of numbered pictures; equal counts give equal sizes, and the time is always the same."""
    entries: list[Entry] = [
        (f"{key.format(n)}.{name}", data)
        for n in range(first, first + count)
        for name, data in sample(n).items()
    ]
    tarred(path, entries)
    os.utime(path, TIME)
    return path


def numbers(manifest: Manifest) -> list[int]:
    """What the pictures of a set show."""
    return [
        n
        for b in sequential(manifest, ViewSpec((12, 12), CenterCrop()), batch_size=8)
        for n in numbers_in(b.views[0].numpy())
    ]


DEEP = "d" * 60 + "/" + "e" * 60
COLLIDING = [
    ["run/1/000.tar", "run_1/000.tar", "run/1_000.tar", "run 1/000.tar"],
    [f"p/{DEEP}/000.tar", f"q/{DEEP}/000.tar"],
    ["gr\u00fcn/0.tar", "gr\u00f6n/0.tar", os.fsdecode(b"gr\xe9n/0.tar"), "gr_n/0.tar"],
]


@pytest.mark.parametrize("names", COLLIDING)
def test_no_shard_is_taken_for_another(tmp_path: Path, names: list[str]) -> None:
    """Alike in size, time and in most of their names, as copies by rsync -a are."""
    paths = [str(pictures(tmp_path / name, 10 * n)) for n, name in enumerate(names)]
    manifest = index(paths, tmp_path / "list")
    assert numbers(manifest) == [10 * n + row for n in range(len(names)) for row in range(2)]
    assert len({shard.sha256 for shard in manifest.shards}) == len(names)
    assert verify(manifest).whole or all("key" in found.reason for found in verify(manifest).findings)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """URL of `tmp_path`, by a server that tells dates and lengths."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_no_url_is_taken_for_another(tmp_path: Path, served: str) -> None:
    names = ["run/1/000.tar", "run_1/000.tar", "run/1_000.tar"]
    paths = [pictures(tmp_path / name, 10 * n) for n, name in enumerate(names)]
    manifest = index([f"{served}/{name}" for name in names], tmp_path / "list")
    local = index([str(path) for path in paths], tmp_path / "local")
    assert [one.sha256 for one in manifest.shards] == [one.sha256 for one in local.shards]


def test_a_server_that_is_gone_isnt_asked_for_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing shard is one bad shard; a server that doesn't answer ends the work."""
    asked = []

    def fetch(url: str, target: Path) -> None:
        asked.append(url)
        missing = url.endswith("/0.tar")
        raise FetchError(
            f"{url}: missing shard" if missing else f"{url}: can't be fetched after 6 attempts: gone"
        )

    monkeypatch.setattr(indexing, "fetch", fetch)
    monkeypatch.setattr(indexing, "version_of", lambda url: None)
    with pytest.raises(DataError) as caught:
        index(["http://127.0.0.1:9/{0..20}.tar"], tmp_path / "list", skip_broken=100)
    assert len(asked) == 5 and len(str(caught.value).splitlines()) == 6
    assert "4 shards in a row are out of reach: the other 16 weren't tried" in str(caught.value)


def test_a_full_disk_of_copies_is_no_fault_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, target: Path) -> None:
        raise DataError(f"{target}: can't be written: No space left on device")

    monkeypatch.setattr(indexing, "fetch", fetch)
    monkeypatch.setattr(indexing, "version_of", lambda url: None)
    with pytest.raises(indexing.CantWriteError, match="No space left on device"):
        index(["http://127.0.0.1:9/{0..20}.tar"], tmp_path / "list", skip_broken=100)


def stopped_after(monkeypatch: pytest.MonkeyPatch, patterns: list[str], out: Path, count: int) -> None:
    """An indexing that is interrupted after so many shards."""
    with monkeypatch.context() as patch:
        done = []

        def interrupt(now: int, total: int) -> None:
            done.append(now)
            if now == count:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            index(patterns, out, progress=interrupt)
        del patch


def test_a_shard_that_changed_meanwhile_is_read_again(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal size and time, in the same place, locally; of another date behind a URL."""
    for n in range(2):
        pictures(tmp_path / f"{n}.tar", 10 * n)
    paths = [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]
    stopped_after(monkeypatch, paths, tmp_path / "list", 1)
    urls = [f"{served}/0.tar", f"{served}/1.tar"]
    stopped_after(monkeypatch, urls, tmp_path / "remote", 1)
    pictures(tmp_path / "0.tar", 50)
    assert numbers(index(paths, tmp_path / "list")) == [50, 51, 10, 11]
    os.utime(tmp_path / "0.tar")
    fresh = index(paths, tmp_path / "fresh")
    assert index(urls, tmp_path / "remote").hash == fresh.hash


@pytest.mark.parametrize("spoil", ["other name", "no json", "no sidecar", "half a sidecar"])
def test_a_receipt_is_believed_only_whole_and_of_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    paths = [str(pictures(tmp_path / f"{n}.tar", 10 * n)) for n in range(2)]
    stopped_after(monkeypatch, paths, tmp_path / "list", 1)
    (receipt,) = (tmp_path / "list" / "index").glob("*.receipt")
    (sidecar,) = (tmp_path / "list" / "index").glob("*.idx")
    if spoil == "other name":
        receipt.write_text(receipt.read_text().replace("/0.tar", "/9.tar"))
    elif spoil == "no json":
        receipt.write_text("{")
    elif spoil == "no sidecar":
        sidecar.unlink()
    else:
        sidecar.write_bytes(sidecar.read_bytes()[:-9])
    read = []
    real = indexing.survey
    monkeypatch.setattr(indexing, "survey", lambda path, split: read.append(path.name) or real(path, split))
    manifest = index(paths, tmp_path / "list")
    assert read == ["0.tar", "1.tar"] and verify(manifest).whole
    assert not list((tmp_path / "list" / "index").glob("*.receipt"))


def test_one_shard_under_two_names_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "a" / "0.tar", 0)
    (tmp_path / "a" / "link.tar").symlink_to("0.tar")
    first = f"{tmp_path}/a/0.tar"
    for other in (f"{tmp_path}/a/../a/0.tar", f"{tmp_path}/a//0.tar", f"{tmp_path}/a/link.tar"):
        with pytest.raises(DataError, match=r"named twice, the first time as .*0.tar; name every shard once"):
            index([first, other], tmp_path / "list")
    assert not (tmp_path / "list" / "manifest.json").exists()


def test_a_manifest_that_names_a_shard_twice_is_refused(tmp_path: Path) -> None:
    own = numbered_set(tmp_path, [2, 2])
    shard = own.shards[0]
    for name in (shard.name, f"./{shard.name}", f"x/../{shard.name}", str(tmp_path / shard.name)):
        twice = Shard(name, shard.samples, shard.bytes, shard.sha256)
        Manifest(tmp_path / "twice", (shard, twice), own.fields).save()
        if name == str(tmp_path / shard.name):
            (tmp_path / "twice" / "manifest.json").rename(tmp_path / "manifest.json")
            place = tmp_path
        else:
            place = tmp_path / "twice"
        with pytest.raises(DataError, match=r"names shard .* twice; make it anew"):
            Manifest.load(place)


def test_equal_content_under_two_names_is_said(tmp_path: Path) -> None:
    first = pictures(tmp_path / "0.tar", 0)
    shutil.copy2(first, tmp_path / "copy.tar")
    paths = [str(first), str(tmp_path / "copy.tar")]
    manifest = index(paths, tmp_path / "list")
    assert manifest.samples == 4
    doubt = manifest.about["indexed"]["doubts"][account.SAME_BYTES]
    assert doubt == {"count": 1, "examples": [f"{paths[1]} as {paths[0]}"]}
    with pytest.raises(DataError, match=r"1 shards hold the same bytes.*--strict"):
        index(paths, tmp_path / "list2", strict=True)
    found = verify(manifest).findings
    assert [str(one) for one in found] == [
        f"{paths[1]}: sample '000': its key is also in {paths[0]}, and 1 more of this shard's"
    ]
    assert verify(manifest, shared_keys=True).whole


def test_keys_that_come_again_in_one_shard_stay_wrong(tmp_path: Path) -> None:
    twice: list[Entry] = [(f"0.{name}", data) for _ in range(2) for name, data in sample(1).items()]
    manifest = index([str(tarred(tmp_path / "0.tar", twice))], tmp_path / "list")
    assert manifest.samples == 2 and account.AGAIN in manifest.about["indexed"]["doubts"]
    told = [str(one) for one in verify(manifest, shared_keys=True).findings]
    assert told == [f"{tmp_path}/0.tar: sample '0': its key comes twice in this shard"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("[2024] trip/0.tar", ["[2024] trip/0.tar"]),
        ("[2024] trip/{0..1}.tar", ["[2024] trip/0.tar", "[2024] trip/1.tar"]),
        ("[2024] trip/*.tar", ["[2024] trip/0.tar", "[2024] trip/1.tar"]),
        ("[2]*/0.tar", ["2/0.tar"]),
        ("a{b}c/0.tar", ["a{b}c/0.tar"]),
        ("back\\slash/0.tar", ["back\\slash/0.tar"]),
        ("back\\slash/{0..1}.tar", ["back\\slash/0.tar", "back\\slash/1.tar"]),
        (r"a\{b\}c/{0..1}.tar", ["a{b}c/0.tar", "a{b}c/1.tar"]),
        ("what?/0.tar", ["what?/0.tar"]),
        ("st*r/0.tar", ["st*r/0.tar"]),
        (f"{LATIN}/*.tar", [f"{LATIN}/0.tar", f"{LATIN}/1.tar"]),
        ("with space", ["with space/0.tar", "with space/1.tar"]),
        ("2/", ["2/0.tar", "2/1.tar"]),
        ("{2,with space}/1.tar", ["2/1.tar", "with space/1.tar"]),
        ("**/1.tar", None),
        ("http://h/x.tar?download=1&a=[b]", ["http://h/x.tar?download=1&a=[b]"]),
        ("http://h/{0..1}.tar?sig=a*b", ["http://h/0.tar?sig=a*b", "http://h/1.tar?sig=a*b"]),
    ],
)
def test_what_exists_is_meant_literally(here: Path, pattern: str, found: list[str] | None) -> None:
    folders = ["[2024] trip", "2", "a{b}c", "back\\slash", "what?", "st*r", LATIN, "with space"]
    for folder in folders:
        (here / folder).mkdir()
        for n in range(2):
            (here / folder / f"{n}.tar").touch()
        (here / folder / "notes.json").touch()
    expected = sorted(f"{folder}/1.tar" for folder in folders) if found is None else found
    assert expanded([pattern]) == expected


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (
            "empty",
            r"empty: a folder without .tar files; name its shards, with a pattern like 'empty/\*\*/\*.tar'",
        ),
        ("packed", "packed: holds 1 compressed tars, for instance 1.tar.gz; unpack them, or name the shards"),
        ("", "an empty name"),
        ("x{1..2", "its braces don't match"),
        ("empty/*.tar", "matches no shard"),
    ],
)
def test_patterns_that_name_nothing_are_refused(here: Path, pattern: str, named: str) -> None:
    (here / "empty").mkdir()
    (here / "packed").mkdir()
    (here / "packed" / "0.tar").touch()
    (here / "packed" / "1.tar.gz").touch()
    with pytest.raises(DataError, match=named):
        expanded([pattern])


def test_all_bad_shards_are_named_at_once(tmp_path: Path) -> None:
    for n in range(8):
        pictures(tmp_path / f"{n}.tar", 10 * n)
    tarred(tmp_path / "2.tar", [])
    (tmp_path / "5.tar").write_bytes(b"")
    (tmp_path / "6.tar").write_bytes((tmp_path / "6.tar").read_bytes()[:1500])
    patterns = [str(tmp_path / "{0..8}.tar")]
    for skip in (0, 3):
        with pytest.raises(DataError) as caught:
            index(patterns, tmp_path / "list", skip_broken=skip, processes=2)
        lines = str(caught.value).splitlines()
        assert [line.partition(": ")[0] for line in lines[:-1]] == [
            f"{tmp_path}/{n}.tar" for n in (2, 5, 6, 8)
        ]
        assert lines[-1].startswith("4 of 9 shards can't be used") and "--skip-broken 4" in lines[-1]
        assert not (tmp_path / "list" / "manifest.json").exists()
    manifest = index(patterns, tmp_path / "list", skip_broken=4)
    assert numbers(manifest) == [10 * n + row for n in (0, 1, 3, 4, 7) for row in range(2)]
    books = manifest.about["indexed"]["shards"]
    assert books["offered"] == 9 and books["taken"] == 5
    assert {reason: left["count"] for reason, left in books["left_out"].items()} == {
        "empty shard": 1, "empty file": 1, "truncated": 1, "no such shard": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"1 shards left out: empty file .*5.tar.*--strict"):
        index(patterns, tmp_path / "other", skip_broken=4, strict=True)


def test_a_set_of_bad_shards_only_isnt_made(tmp_path: Path) -> None:
    tarred(tmp_path / "0.tar", [("README", b"")])
    with pytest.raises(
        DataError, match=r"empty shard: no member is named KEY.FIELD \(1 members left out: its name"
    ):
        index([str(tmp_path / "0.tar")], tmp_path / "list", skip_broken=5)


def test_strict_counts_everything_but_folders(tmp_path: Path) -> None:
    good: list[Entry] = [("./", "folder"), *((f"0.{name}", data) for name, data in sample(0).items())]
    path = str(tarred(tmp_path / "0.tar", good))
    manifest = index([path], tmp_path / "a", strict=True)
    left = manifest.about["indexed"]["members"]["left_out"]
    assert left == {members.FOLDER: {"count": 1, "examples": ["."]}}
    for extra, named in (
        (("._0.jpg", b""), "1 members left out: an AppleDouble copy"),
        (("1.txt", b"no picture"), r"1 samples have no picture \(for instance 1 \(txt\)\)"),
        (("1.png", "hard 7.png"), "1 members left out: a link that leads to nothing"),
        (("0.cls", b"1"), "1 samples begin where a field came a second time"),
        (
            ("0.jpg", b"2"),
            r"1 samples have more than one picture, of which one is read \(.* 0 \(cls, jpg, png\)\)",
        ),
    ):
        tarred(tmp_path / "0.tar", [*good, extra])
        with pytest.raises(DataError, match=named):
            index([path], tmp_path / "b", strict=True)
        assert not (tmp_path / "b" / "manifest.json").exists()
        assert index([path], tmp_path / "c").samples in (1, 2)


def test_fields_apart_are_said(tmp_path: Path) -> None:
    """`tar cf x.tar *.png *.cls`: all pictures, then all labels."""
    entries: list[Entry] = [(f"{n}.{name}", sample(n)[name]) for name in ("png", "cls") for n in range(3)]
    manifest = index([str(tarred(tmp_path / "0.tar", entries))], tmp_path / "list")
    lines = account.Account.from_dict(manifest.about["indexed"]).lines(manifest.fields)
    assert manifest.samples == 6 and len(lines) == 3  # no picture, no label, and their keys again
    assert lines[0].startswith("3 samples have no label (for instance 0, 1, 2)")
    assert lines[1].startswith("3 samples have no picture (for instance 0 (cls), 1 (cls), 2 (cls))")
    again = "3 samples have the key of an earlier one in their shard; the members of a sample"
    assert lines[2].startswith(again)


def test_fields_may_be_chosen(tmp_path: Path) -> None:
    entries: list[Entry] = [
        (f"{n}.{name}", data)
        for n in range(4)
        for name, data in (("image.PNG", sample(n)["png"]), ("class.id", b"%d" % n), ("caption.txt", b"x"))
    ]
    path = str(tarred(tmp_path / "0.tar", entries))
    plain = index([path], tmp_path / "plain")
    (line,) = account.Account.from_dict(plain.about["indexed"]).lines(plain.fields)
    assert "; if it is in image.png, index with --picture-field; if names have dots" in line
    with pytest.raises(
        DataError, match=r"field jpg, jpeg.*: missing; the sample has caption.txt.*--picture-field"
    ):
        numbers(plain)
    chosen = index([path], tmp_path / "chosen", fields=Fields(("image.png",), ("class.id",)), strict=True)
    assert numbers(chosen) == [0, 1, 2, 3] and chosen.labelled and chosen.hash != plain.hash
    batch = next(sequential(chosen, ViewSpec((8, 8), CenterCrop()), batch_size=4))
    assert batch.target is not None and batch.target.tolist() == [0, 1, 2, 3]
    assert verify(chosen).whole and stats(chosen).labels == {str(n): 1 for n in range(4)}
    assert Manifest.load(tmp_path / "chosen").pictures == ("image.png",)
    with pytest.raises(
        DataError, match=r"--label-field: found cls, but the shards have the fields caption.txt, cl"
    ):
        index([path], tmp_path / "wrong", fields=Fields(label=("cls",)))


@pytest.mark.parametrize(
    ("label", "named"),
    [
        (b"cat", "a label is a whole number, found 'cat'"),
        (b"5.0", "a label is a whole number, found '5.0'"),
        (b"", "a label is a whole number, found ''"), (b"-1", "a label is a number from 0 to"),
        (b"7", "label '7' isn't a class of the 2 there are"), (b"1\n", None),
    ],
)  # fmt: skip
def test_labels_that_arent_class_numbers_are_named(tmp_path: Path, label: bytes, named: str | None) -> None:
    path = tarred(tmp_path / "0.tar", [("0.png", sample(0)["png"]), ("0.cls", label)])
    told = [str(one) for one in verify(index([str(path)], tmp_path / "l", classes=("a", "b"))).findings]
    assert (named is None and not told) or (len(told) == 1 and str(named) in told[0])


def test_names_with_dots_are_split_where_asked(tmp_path: Path) -> None:
    entries: list[Entry] = [(f"www.site{n}.com_{n}.png", sample(n)["png"]) for n in range(9)]
    path = str(tarred(tmp_path / "0.tar", entries))
    first = index([path], tmp_path / "first")
    assert first.samples == 1 and len(first.fields) == 9
    (line,) = account.Account.from_dict(first.about["indexed"]).lines(first.fields)
    assert "1 samples have no picture (for instance www (site0.com_0.png" in line
    assert line.endswith(
        "9 fields with endings of pictures; if names have dots of their own, with --split-at last"
    )
    last = index([path], tmp_path / "last", fields=Fields(split="last"), strict=True)
    assert last.index(0).keys() == [f"www.site{n}.com_{n}" for n in range(9)] and last.fields == ("png",)
    assert numbers(last) == list(range(9)) and verify(last).whole and last.hash != first.hash


def test_thousands_of_fields_take_linear_room(tmp_path: Path) -> None:
    count = 4000
    entries: list[Entry] = [(f"t{n:05d}.169{n:07d}.jpg", b"x") for n in range(count)]
    manifest = index([str(tarred(tmp_path / "0.tar", entries))], tmp_path / "list")
    sidecar = manifest.index_path(0)
    assert manifest.samples == count and sidecar.stat().st_size < 100 * count
    assert manifest.index(0).nbytes < 60 * count
    reader = Reader(manifest)
    assert reader.read(0, 3999, [], manifest.fields) == [("1690003999.jpg", b"x")]
    reader.close()
    found = verify(manifest, pictures=False)
    assert len(found.findings) + found.more == count and len(found.findings[0].reason) < 200
    assert len(stats(manifest, look_at=5).fields) == count


def test_sets_of_the_dense_format_are_still_read(tmp_path: Path) -> None:
    """A sidecar as format 2 wrote it, made here by hand."""
    import struct

    import numpy as np
    from xxhash import xxh3_64_intdigest

    manifest = numbered_set(tmp_path, [3])
    index, fields = manifest.index(0), manifest.fields
    shape = (len(index), len(fields))
    offsets, sizes, sums = np.full(shape, -1, "<i8"), np.zeros(shape, "<i8"), np.zeros(shape, "<u8")
    for row in range(len(index)):
        for number, at, size, checksum in zip(*index.row(row)[1:], strict=True):
            offsets[row, number], sizes[row, number], sums[row, number] = at, size, checksum
    names = json.dumps(fields).encode()
    head = struct.pack("<8sQQIII", b"keelidx2", index.shard_bytes, *shape, len(names), len(index.key_text))
    ends = index.key_ends.astype("<u4").tobytes()
    body = head + names + index.key_text + offsets.tobytes() + sizes.tobytes() + sums.tobytes() + ends
    old = body + struct.pack("<Q", xxh3_64_intdigest(body))
    assert Index.from_bytes(old, "x").to_bytes() == index.to_bytes()
    write_whole(manifest.index_path(0), old)
    assert numbers(Manifest.load(tmp_path)) == [0, 1, 2] and verify(manifest).whole


def test_names_that_arent_utf8_are_carried_through(tmp_path: Path) -> None:
    raw = os.fsdecode(b"b\xe9b\xe9")
    entries: list[Entry] = [
        (f"{raw}.png", sample(3)["png"]),
        (f"{raw}.{raw}", b"field"),
        (f"._{raw}.png", b""),
    ]
    path = tarred(tmp_path / LATIN / "0.tar", entries)
    manifest = index([str(path)], tmp_path / LATIN / "list")
    assert manifest.index(0).keys() == [raw] and raw in manifest.fields and numbers(manifest) == [3]
    report = verify(Manifest.load(tmp_path / LATIN / "list"))
    assert report.whole and json.loads(report.to_json().encode())["members"]["left_out"]
    with manifest.shard_path(0).open("r+b") as file:
        file.seek(530)  # in the picture
        file.write(b"damage")
    assert json.loads(verify(manifest).to_json().encode())["findings"][1]["key"] == raw
    manifest.path.read_bytes().decode("utf-8")


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_places_that_cant_be_written_are_refused_in_a_line(tmp_path: Path, kind: str) -> None:
    path = pictures(tmp_path / "0.tar", 0)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "ro").mkdir(mode=0o555)
    out = {"a file": "file", "below a file": "file/list", "read-only": "ro/list"}[kind]
    script = "import sys; from launch.cli.main import main; main()"
    command = [
        *unprivileged(),
        sys.executable,
        "-c",
        script,
        "data",
        "index",
        str(path),
        "--out",
        str(tmp_path / out),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 2 and len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    assert f"{tmp_path / out}: can't be written: " in ran.stderr
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "ro").iterdir())


def test_a_full_disk_is_said_in_a_line_and_leaves_no_manifest(tmp_path: Path) -> None:
    paths = [str(pictures(tmp_path / f"{n}.tar", 10 * n)) for n in range(2)]
    with FullDisk(tmp_path / "count") as disk:
        expected = index(paths, tmp_path / "count")
    assert disk.calls > 10
    for at in range(disk.calls):
        out = tmp_path / f"list{at}"
        with FullDisk(out, at), pytest.raises(DataError, match=r"can't be written: No space left on device"):
            index(paths, out)
        assert not (out / "manifest.json").exists() and not list(out.rglob("*.part")), disk.log[at]
    assert index(paths, out).hash == expected.hash
    assert {file.suffix for file in out.rglob("*.*")} == {".json", ".idx"}


def test_the_second_road_finds_what_a_sidecar_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the first road, planted: it passes over a member in silence, indexing and verifying."""
    from data_pipeline import index as module

    path = tarred(
        tmp_path / "0.tar", [(f"{n}.{name}", data) for n in range(3) for name, data in sample(n).items()]
    )
    real = module.walk

    def forgetful(*arguments: object) -> members.Contents:
        found = real(*arguments)  # type: ignore[arg-type]
        del found.members[-1]
        return found

    monkeypatch.setattr(module, "walk", forgetful)
    manifest = index([str(path)], tmp_path / "list")
    (found,) = verify(manifest).findings
    assert (
        "1 members of the tar aren't in its index and 0 of the index aren't in the tar, for instance '2.cls'"
        in str(found)
    )


def test_an_account_that_isnt_the_tars_is_found(tmp_path: Path) -> None:
    path = tarred(tmp_path / "0.tar", [("0.png", sample(0)["png"]), ("._0.png", b""), ("README", b"")])
    manifest = index([str(path)], tmp_path / "list")
    assert verify(manifest).whole and verify(manifest).members.offered == 3
    content = json.loads(manifest.path.read_text())
    content["about"]["indexed"]["members"]["left_out"][members.NO_FIELD]["count"] = 5
    manifest.path.write_text(json.dumps(content))
    told = [str(one) for one in verify(Manifest.load(tmp_path / "list")).findings]
    assert told == [
        f"manifest.json: says that 5 members are left out as {members.NO_FIELD}, but there are 1; "
        "index the shards anew"
    ]


def test_labels_that_nobody_can_use_are_said_when_a_set_is_indexed(tmp_path: Path) -> None:
    path = tarred(
        tmp_path / "words.tar",
        [member for n in range(4) for member in ((f"{n}.jpg", b"\xff\xd8"), (f"{n}.cls", b"cat"))],
    )
    manifest = index([str(path)], tmp_path / "set", classes=("cat", "dog"))
    doubt = manifest.about["indexed"]["doubts"][account.BAD_LABEL]
    assert doubt == {"count": 4, "examples": ["0: a label is a whole number, found 'cat'"]}
    with pytest.raises(DataError, match=r"4 samples have a label that can't be used.*--strict"):
        index([str(path)], tmp_path / "strict", strict=True)
