"""Every member of a tar becomes a sample's field, or is passed over for a reason that is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from posixpath import dirname, join, normpath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline import members
from data_pipeline.index import Index, index_shard, survey
from data_pipeline.indexing import add_shard
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.read import Reader, SampleError, ShardError
from data_pipeline.recount import recount
from data_pipeline.verify import verify
from tests.data_pipeline.tars import Entry, sparse, tarred, with_sparse

FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def indexed(path: Path) -> Manifest:
    """A set of one shard."""
    made = add_shard(path.parent, path, path.name)
    Manifest(path.parent, (made.shard,), made.fields).save()
    return Manifest.load(path.parent)


def in_memory(path: Path) -> Manifest:
    """The same without a file: the property test makes many."""
    index, digest = index_shard(path)
    kept = Index.from_bytes(index.to_bytes(), "x")

    class InMemory(Manifest):
        def index(self, number: int) -> Index:
            return kept

    return InMemory(path.parent, (Shard(path.name, len(index), index.shard_bytes, digest),), index.fields)


def contents(path: Path) -> list[tuple[str, str, bytes]]:
    """Key, field and payload of all that a shard's reader gives."""
    manifest = in_memory(path)
    index, reader = manifest.index(0), Reader(manifest)
    found = [
        (key, name, data)
        for row, key in enumerate(index.keys())
        for name, data in reader.read(0, row, [], index.fields)
    ]
    reader.close()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_links_have_the_payload_they_lead_to(tmp_path: Path, form: int) -> None:
    path = tarred(
        tmp_path / "x.tar",
        [
            ("./0.jpg", b"zero"), ("./1.jpg", "hard ./0.jpg"), ("./2.jpg", "hard 1.jpg"),
            ("3.jpg", "soft 0.jpg"), ("deep/4.jpg", "soft ../pool/blob"), ("pool/blob", b"a blob"),
            ("5.jpg", "soft deep/4.jpg"),
            ("6.jpg", "soft 7.jpg"), ("7.jpg", "soft ./pool/../6.jpg"), ("8.jpg", "soft /etc/passwd"),
            ("9.jpg", "hard later.jpg"), ("later.jpg", b"later"), ("10.jpg", "soft pool"), ("pool", "folder"),
        ],
        form,
    )  # fmt: skip
    assert contents(path) == [
        ("./0", "jpg", b"zero"), ("./1", "jpg", b"zero"), ("./2", "jpg", b"zero"), ("3", "jpg", b"zero"),
        ("deep/4", "jpg", b"a blob"), ("5", "jpg", b"a blob"), ("later", "jpg", b"later"),
    ]  # fmt: skip
    books = survey(path).books
    assert books.balance and books.offered == 14 and books.taken == 7
    assert {reason: left.count for reason, left in books.left_out.items()} == {
        members.LINK_NOWHERE: 4, members.NO_FIELD: 1, members.LINK_TO_FOLDER: 1, members.FOLDER: 1,
    }  # fmt: skip
    assert books.left_out[members.LINK_NOWHERE].examples == ["6.jpg", "7.jpg", "8.jpg"]


def test_what_isnt_read_is_counted_by_reason(tmp_path: Path) -> None:
    names = {
        members.FOLDER: [("./", "folder"), ("a/", "folder")],
        members.SPECIAL: [("pipe.jpg", "fifo"), ("volume.jpg", "type V")],
        members.HIDDEN: [(".hidden.jpg", b""), ("a/.DS_Store", b"")],
        members.APPLE_DOUBLE: [("./._0.jpg", b"")],
        members.META: [("__meta__/info.json", b"{}"), ("./__a__/x.jpg", b""), ("__x__", b""), ("__", b"")],
        members.NO_FIELD: [("README", b""), ("a/0.", b"")],
    }
    entries: list[Entry] = [entry for some in names.values() for entry in some]  # type: ignore[misc]
    path = tarred(tmp_path / "x.tar", [*entries, ("0.jpg", b"x"), ("__info__.json", b"{}")])
    books = survey(path).books
    counts = {reason: left.count for reason, left in books.left_out.items()}
    assert counts == {reason: len(some) for reason, some in names.items()}
    assert index_shard(path)[0].keys() == ["0", "__info__"]
    assert recount(path)[1].as_dict() == books.as_dict()


def test_webdatasets_meta_is_passed_over_as_webdataset_does(tmp_path: Path) -> None:
    import webdataset
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = tarred(
        tmp_path / "x.tar",
        [
            ("__meta__/d.json", b"{}"),
            ("__i__.json", b"{}"),
            ("__k__", b""),
            ("0.jpg", b"0"),
            ("__a/0.jpg", b""),
        ],
    )
    assert webdataset.__version__
    with path.open("rb") as stream:
        read = list(group_by_keys(tar_file_expander([{"url": "x", "stream": stream}])))
    assert [one["__key__"] for one in read] == index_shard(path)[0].keys() == ["__i__", "0", "__a/0"]


PADDED = b"\xff\xd8" + bytes(5000) + b"middle" + bytes(9000) + b"end" + bytes(20000)


def test_sparse_members_are_read_with_their_holes(tmp_path: Path) -> None:
    path = with_sparse(tarred(tmp_path / "x.tar", [("0.jpg", b"plain"), ("0.txt", b"t")]), PADDED)
    assert path.stat().st_size < len(PADDED)
    assert contents(path) == [("0", "jpg", b"plain"), ("0", "txt", b"t"), ("x", "jpg", PADDED)]
    data = index_shard(path)[0].to_bytes()
    assert Index.from_bytes(data, "x").to_bytes() == data
    manifest, at = indexed(path), path.read_bytes().index(b"middle")
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"M")
    with pytest.raises(SampleError, match="sample 'x': field jpg: payload differs"):
        Reader(manifest).read(0, 1, [("jpg",)])


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_members_of_gnu_tar_itself(tmp_path: Path, version: str) -> None:
    if shutil.which("tar") is None:
        pytest.fail("these tests need GNU tar")
    with (tmp_path / "0.jpg").open("wb") as file:
        file.write(b"begin")
        for at in range(1 << 16, 1 << 20, 1 << 16):  # more pieces than a header holds
            file.seek(at)
            file.write(b"%d" % at)
        file.truncate(3 << 20)
    form = ["--format=gnu"] if version == "0.0" else ["--format=pax", f"--sparse-version={version}"]
    subprocess.run(["tar", "-S", *form, "-cf", "x.tar", "0.jpg"], cwd=tmp_path, check=True)
    path, payload = tmp_path / "x.tar", (tmp_path / "0.jpg").read_bytes()
    assert contents(path) == [("0", "jpg", payload)]
    assert verify(indexed(path), pictures=False).whole


def test_a_hole_without_end_is_passed_over_and_said(tmp_path: Path) -> None:
    data = bytearray(sparse(b"x" * 512, "big.jpg"))
    data[483:495] = b"%011o\0" % (1 << 32)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path = tarred(tmp_path / "x.tar", [("0.jpg", b"x")])
    path.write_bytes(bytes(data) + path.read_bytes())
    books = survey(path).books
    assert books.left_out[members.TOO_SPARSE].examples == ["big.jpg"] and books.taken == 1
    assert recount(path)[1].as_dict() == books.as_dict()


def test_a_negative_size_ends_the_walk_and_doesnt_hang(tmp_path: Path) -> None:
    path = tarred(tmp_path / "x.tar", [("0.jpg", b"x"), ("1.jpg", b"y")])
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = b"\xff" * 10 + b"\xfb\xff"  # -1025: back to the first header
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"damaged tar header \(its size is negative\)"):
        index_shard(path)


@pytest.mark.parametrize(
    ("tail", "named"),
    [
        (
            b"garbage" * 100,
            r"700 bytes that aren't part of the tar lie behind its end, from byte 10240 on; cut",
        ),
        ("second", "it is blank, and the tar goes on at byte 10240.*tar --concatenate"),
        (bytes(100_000), None),
    ],
)
def test_what_follows_the_end_is_named(tmp_path: Path, tail: bytes | str, named: str | None) -> None:
    path = tarred(tmp_path / "x.tar", [("0.jpg", b"x")])
    more = tail if isinstance(tail, bytes) else tarred(tmp_path / "y.tar", [("1.jpg", b"y")]).read_bytes()
    path.write_bytes(path.read_bytes() + more)
    if named is None:
        assert index_shard(path)[0].keys() == ["0"]
        return
    with pytest.raises(DataError, match=named) as caught:
        index_shard(path)
    assert "\n" not in str(caught.value)
    if isinstance(tail, bytes):  # what the message says to do helps
        os.truncate(path, int(str(caught.value).partition("truncate -s ")[2].partition(")")[0]))
        assert index_shard(path)[0].keys() == ["0"]


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"PAR1xx", "a parquet table"), (b"\x1f\x8b\x08", "compressed by gzip; unpack"),
        (b"\x28\xb5\x2f\xfd\0", "compressed by Zstandard; unpack"), (b"PK\3\4", "a zip file"),
        (b'{"a": 1}', "JSON"), (b"<html>404", "a web page"), (b"nonsense", "invalid header; name tars only"),
    ],
)  # fmt: skip
def test_files_that_are_no_tars_are_known(tmp_path: Path, start: bytes, named: str) -> None:
    (tmp_path / "x.tar").write_bytes(start * 200)
    with pytest.raises(DataError, match=f"x.tar: not a plain tar file: {named}"):
        index_shard(tmp_path / "x.tar")


def test_folders_and_pipes_arent_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name, what in (("pipe.tar", "neither a file nor a folder"), ("folder.tar", "a folder")):
        with pytest.raises(DataError, match=f"{name}: {what}, where a tar shard should be"):
            index_shard(tmp_path / name)


# Names of members, alike often enough that links lead somewhere and fields come again
LATIN = os.fsdecode(b"b\xe9")
PARTS = ["0", "1", LATIN, "x" * 120, ".h", "._a", "__m__", "a.b", "\U0001f600", "r\nq", ""]
NAMES = st.builds(
    lambda folder, stem, field: f"{folder}{stem}{field}",
    st.sampled_from(["", "./", "d/", "d.e/", "__m__/", f"{LATIN}/"]),
    st.sampled_from(PARTS),
    st.sampled_from(["", ".jpg", ".JPG", ".txt", ".", ".a.png", f".{LATIN}", "..x"]),
).filter(lambda name: name.strip("/.") != "" and not name.endswith("/"))
ENTRIES = st.lists(
    st.tuples(
        NAMES,
        st.one_of(
            st.binary(max_size=600), st.binary(max_size=600), st.sampled_from(["folder", "fifo", "type V"]),
            st.builds(lambda kind, to: f"{kind} {to}", st.sampled_from(["hard", "soft"]), NAMES),
        ),
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip


def reference(path: Path) -> Counter[tuple[str, str, bytes]]:
    """What must come out of a tar, in ten lines of plain tarfile."""
    found: Counter[tuple[str, str, bytes]] = Counter()
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        infos = tar.getmembers()
        for number, info in enumerate(infos):
            at, last = number, info.name.rpartition("/")[2]
            for _ in range(50):
                one = infos[at]
                to = normpath(one.linkname if one.islnk() else join(dirname(one.name), one.linkname))
                same = [n for n, i in enumerate(infos) if normpath(i.name) == to and (n < at or one.issym())]
                same = [n for n in same if infos[n].type in b"0125\0S"]
                at = same[-1] if (one.islnk() or one.issym()) and same else at
            meta = info.name.removeprefix("./").startswith("__m__/") or last == info.name == "__m__"
            stem, _, field = last.partition(".")
            if infos[at].isreg() and stem and field and not meta:
                file = tar.extractfile(infos[at])
                assert file is not None
                found[info.name[: -len(field) - 1], field.lower(), file.read()] += 1
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(entries=ENTRIES, form=st.sampled_from(FORMS), holes=st.booleans())
def test_what_comes_out_is_what_went_in(tmp_path: Path, entries: list[Entry], form: int, holes: bool) -> None:
    """Random tars: their books balance, both roads count alike, and the reader gives what tarfile gives."""
    path = tmp_path / "x.tar"
    try:
        tarred(path, entries, form)
    except ValueError:  # USTAR can't hold every name
        tarred(path, entries, tarfile.PAX_FORMAT)
    if holes:
        with_sparse(path, PADDED)
    expected = reference(path)
    counted, books = recount(path)
    assert books.balance and books.offered == len(entries) + holes and books.taken == expected.total()
    fields = Counter((key, field, size) for key, field, _, size in counted.elements())
    assert fields == Counter((key, field, len(data)) for key, field, data in expected.elements())
    if not expected:
        with pytest.raises(DataError, match="empty shard"):
            survey(path)
        return
    assert survey(path).books.as_dict() == books.as_dict()
    assert Counter(contents(path)) == expected


def damaged(path: Path, payload: bytes) -> None:
    """One bit of a payload flipped."""
    data = bytearray(path.read_bytes())
    data[data.index(payload) + 5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "stem",
    ["q", "q" + "\u5c71" * 30, "q" + "\u5c71" * 53, "x" * 93, f"q{LATIN}" * 34],
)
def test_a_damaged_payload_is_one_sample_whatever_its_name(tmp_path: Path, form: int, stem: str) -> None:
    """What a header holds of a name depends on its format; names are bytes."""
    payloads = [b"%05dx" % n * 40 for n in range(12)]
    entries: list[Entry] = [(f"{stem}{n}.jpg", data) for n, data in enumerate(payloads)]
    try:
        path = tarred(tmp_path / "x.tar", entries, form)
    except ValueError:  # USTAR can't hold the name
        form = tarfile.PAX_FORMAT
        path = tarred(tmp_path / "x.tar", entries, form)
    manifest = in_memory(path)
    damaged(path, payloads[6])
    reader = Reader(manifest)
    with pytest.raises(SampleError, match="payload differs from its checksum"):
        reader.read(0, 6, [("jpg",)])
    assert reader.read(0, 7, [("jpg",)]) == [("jpg", payloads[7])]
    tarred(path, [(f"y{name[1:]}", data.swapcase()) for name, data in entries], form)
    assert path.stat().st_size == manifest.shards[0].bytes
    with pytest.raises(ShardError, match="changed shard"):
        reader.read(0, 3, [("jpg",)])
    reader.close()
