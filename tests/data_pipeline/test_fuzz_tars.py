"""Whatever names, links and headers a tar has, only our own errors come out, and both roads count alike.

A few inputs here, 1,000 and more of each kind under make torture.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline.index import index_shard, survey
from data_pipeline.indexing import Fields, index
from data_pipeline.manifest import Manifest
from data_pipeline.read import Reader
from data_pipeline.recount import recount
from data_pipeline.verify import verify
from tests.data_pipeline.sets import sample
from tests.data_pipeline.tars import Entry, tarred, with_sparse

TORTURE = os.environ.get("KEEL_TORTURE") == "1"
MANY = 1500 if TORTURE else 30
pytestmark = [pytest.mark.torture] if TORTURE else []  # so that make torture runs these at length
FUZZ = settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))
FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMES = st.binary(min_size=1, max_size=160).filter(lambda name: b"\0" not in name).map(os.fsdecode)
KEYED = st.builds(
    lambda stem, field: f"{stem}.{field}", NAMES, st.sampled_from(["png", "cls", "Jpg"]) | NAMES
)


def judged(path: Path, folder: Path, split: str = "first") -> Manifest | None:
    """Indexed, read to the end and verified; None where the tar was refused in a line."""
    try:
        manifest = index([str(path)], folder / "list", fields=Fields(split=split))  # type: ignore[arg-type]
    except DataError as error:
        assert "shard" in str(error) or "named" in str(error) or "tar" in str(error)
        assert "\n" not in str(error)
        return None
    manifest.path.read_bytes().decode()  # UTF-8, whatever the names are
    reader, found = Reader(manifest), manifest.index(0)
    for row in range(len(found)):
        assert [name for name, _ in reader.read(0, row, [], found.fields)] == found.fields_of(row)
    reader.close()
    report = verify(manifest, pictures=False)
    report.to_json().encode()
    assert report.members.balance and report.members.taken == len(found.offset)
    assert not any("index" in one.reason or "left out" in one.reason for one in report.findings)
    return manifest


@FUZZ
@given(
    names=st.lists(KEYED | NAMES, min_size=1, max_size=6),
    form=st.sampled_from(FORMS),
    split=st.sampled_from(["first", "last"]),
)
def test_names_of_any_bytes(tmp_path: Path, names: list[str], form: int, split: str) -> None:
    path = tmp_path / "x.tar"
    entries: list[Entry] = [(name, sample(n)["png"]) for n, name in enumerate(names)]
    try:
        tarred(path, entries, form)
    except ValueError:  # USTAR can't hold every name
        tarred(path, entries, tarfile.GNU_FORMAT)
    judged(path, tmp_path, split)


@FUZZ
@given(
    links=st.lists(
        st.tuples(
            KEYED, st.sampled_from(["hard", "soft"]), st.sampled_from(["a.png", "./a.png", "d", "b"]) | NAMES
        ),
        min_size=1,
        max_size=8,
    ),
    form=st.sampled_from(FORMS),
    loops=st.booleans(),
)
def test_links_to_anywhere(tmp_path: Path, links: list[tuple[str, str, str]], form: int, loops: bool) -> None:
    path = tmp_path / "x.tar"
    entries: list[Entry] = [
        ("a.png", b"a"),
        ("d", "folder"),
        *((name, f"{kind} {to}") for name, kind, to in links),
    ]
    if loops:  # each to the next, the last to the first
        entries += [
            (name, f"soft {after[0]}") for (name, *_), after in zip(links, links[1:] + links[:1], strict=True)
        ]
    try:
        tarred(path, entries, form)
    except ValueError:
        tarred(path, entries, tarfile.GNU_FORMAT)
    judged(path, tmp_path)


@st.composite
def headers(draw: st.DrawFn, data: bytes) -> bytes:
    """A tar with fields of its headers replaced and their checksums made right again, as no accident does."""
    out = bytearray(data)
    blocks = [at for at in range(0, len(out), 512) if out[at + 257 : at + 262] == b"ustar"]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(blocks))
        start, length = draw(
            st.sampled_from(
                [(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155), (386, 24), (482, 13)]
            )
        )
        new = draw(
            st.sampled_from(
                [
                    b"-1\0",
                    b"\xff" * 12,
                    b"\x80" + b"\xff" * 11,
                    b"77777777777\0",
                    b"0" * 11 + b"\0",
                    b"LKxgSVMND5",
                ]
            )
            | st.binary(max_size=length)
        )[:length]
        if length == 1:
            new = draw(
                st.sampled_from(
                    [b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"5", b"6", b"V", b"M", b"\0", b"X"]
                )
            )
        out[at + start : at + start + len(new)] = new
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % (sum(out[at : at + 512]) & 0o777777)
    return bytes(out)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """One of each format, with links, long names and holes."""
    folder = tmp_path_factory.mktemp("tars")
    entries: list[Entry] = [
        ("0.png", b"x" * 600), ("0.cls", b"1"), ("1.png", "hard 0.png"),
        ("d" * 60 + "/" + "y" * 60 + ".png", b"z" * 40),
        ("2.png", "soft 0.png"), ("\u00fc.png", b""), ("d", "folder"),
    ]  # fmt: skip
    made = [tarred(folder / f"{form}.tar", entries, form).read_bytes() for form in FORMS]
    return [*made, with_sparse(folder / "1.tar", b"a" + bytes(9000) + b"b").read_bytes()]


@FUZZ
@given(data=st.data(), which=st.integers(0, 3))
def test_headers_of_any_content(tmp_path: Path, tars: list[bytes], data: st.DataObject, which: int) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data.draw(headers(tars[which])))
    judged(path, tmp_path)


@settings(FUZZ, max_examples=20_000 if TORTURE else 150)
@given(data=st.data(), which=st.integers(0, 3))
def test_both_roads_count_alike(tmp_path: Path, tars: list[bytes], data: st.DataObject, which: int) -> None:
    """As above without writing a set, so many more."""
    path = tmp_path / "x.tar"
    path.write_bytes(data.draw(headers(tars[which])))
    try:
        found = survey(path)
    except DataError as error:
        assert "\n" not in str(error)
        return
    counted, books = recount(path)
    assert books.as_dict() == found.books.as_dict()
    keys, one = found.index.keys(), index_shard(path)[0]
    names = [
        (keys[n], one.fields[f]) for n, f in zip(one.sample_of.tolist(), one.field_of.tolist(), strict=True)
    ]
    assert sorted((key, field) for key, field, *_ in counted.elements()) == sorted(names)
