"""Whatever folder or table is packed: a set that balances, or our own error and nothing published.

A few inputs here; under make torture 1,000 of each kind that writes a set.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline.books import Books
from data_pipeline.classes import read_classes
from data_pipeline.manifest import Manifest
from data_pipeline.pack import pack
from tests.data_pipeline.sets import encoded, photograph
from tests.data_pipeline.test_fuzz import mutations

TORTURE = os.environ.get("KEEL_TORTURE") == "1"
pytestmark = [pytest.mark.torture] if TORTURE else []  # so that make torture runs these at length
FUZZ = settings(max_examples=1000 if TORTURE else 30, deadline=None, suppress_health_check=list(HealthCheck))

PICTURE = encoded(photograph(5, 7), "JPEG")
NAMES = st.one_of(
    st.sampled_from(
        ["a", "b.jpg", "c.JPG", "h.jpeg", "i.jfif", "j.jpg", "d.png", "e.txt", "._b.jpg", ".hidden", "@eaDir",
         "metadata.csv", "f.json", "b.txt", "g h.jpg", "%41.jpg", "train", "-", "k=v.jpg", "\u732b.jpg",
         "l'\"\\.jpg"]
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=8).map(os.fsdecode),
).filter(lambda name: name not in (".", "..") and "/" not in name and "\0" not in name)  # fmt: skip
CONTENTS = st.one_of(
    st.just(PICTURE), st.just(PICTURE), st.just(PICTURE), mutations(PICTURE), st.just(b""),
    st.just(b"a caption\n"),
    st.just(b'{"caption": ["one", "two"], "n": NaN}'), st.binary(max_size=40),
)  # fmt: skip


@st.composite
def folders(draw: st.DrawFn) -> list[tuple[str, str, bytes | str]]:
    """What to make, in order: (kind, path, content or target)."""
    usual = draw(st.sampled_from([[], [("file", "0.jpg", PICTURE)], [("file", "cat/0.jpg", PICTURE)]]))
    made: list[tuple[str, str, bytes | str]] = list(usual)
    places = ["cat"] if made and made[0][1].startswith("cat") else [""]
    for _ in range(draw(st.integers(0, 9))):
        path = os.path.join(draw(st.sampled_from(places)), draw(NAMES))  # noqa: PTH118 names are bytes
        match draw(st.sampled_from(["file", "file", "file", "folder", "link", "hard", "pipe"])):
            case "folder":
                places.append(path)
                made.append(("folder", path, b""))
            case "link":
                target = draw(st.sampled_from([*places, *(p for _, p, _ in made), "..", ".", "nowhere"]))
                made.append(("link", path, target))
            case "hard":
                target = draw(st.sampled_from([*(p for _, p, _ in made), "nowhere"]))
                made.append(("hard", path, target))
            case kind:
                made.append((kind, path, draw(CONTENTS)))
    return made


def lay(root: Path, made: list[tuple[str, str, bytes | str]]) -> None:
    root.mkdir()
    for kind, name, content in made:
        path = root / name
        try:
            if kind == "folder":
                path.mkdir(parents=True)
            elif kind == "link":
                path.symlink_to(root / str(content), target_is_directory=True)
            elif kind == "hard":
                path.hardlink_to(root / str(content))
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                assert isinstance(content, bytes)
                path.parent.mkdir(exist_ok=True)
                with path.open("xb") as file:  # never into a pipe that has the name already
                    file.write(content)
        except OSError:
            continue  # the name is taken, or too long for this file system: one thing less


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def require_sound(source: Path, out: Path, *, skip_broken: int) -> None:
    """Pack; what is published balances and reads back, or one of our errors comes and nothing is there."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        pack(source, out, skip_broken=skip_broken)
    except DataError as error:
        assert str(error).strip() and all(line.strip() for line in str(error).splitlines())
        str(error).encode()  # can be printed anywhere
        assert not (out / "manifest.json").exists()
        return
    manifest = Manifest.load(out)
    books = [Books.from_dict(content) for content in manifest.about.values() if _is_books(content)]
    assert books and all(account.balance for account in books)
    assert sum(len(manifest.index(number)) for number in range(len(manifest.shards))) == manifest.samples
    names = [json.loads(line) for line in (out / "names.jsonl").read_bytes().split(b"\n") if line]
    assert len(names) == manifest.samples


def _is_books(content: object) -> bool:
    return isinstance(content, dict) and "left_out" in content


@FUZZ
@given(made=folders(), skip=st.sampled_from([0, 9, 9]))
def test_folders(place: Path, made: list[tuple[str, str, bytes | str]], skip: int) -> None:
    shutil.rmtree(place / "photos", ignore_errors=True)
    lay(place / "photos", made)
    require_sound(place / "photos", place / "out", skip_broken=skip)


CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**13), st.floats(), st.text(max_size=8),
    st.sampled_from(["a.jpg", "b.jpg", "../x.jpg", "http://a/b.jpg", "~/a.jpg", "C:\\a.jpg", "\udce9.jpg"]),
    st.lists(st.one_of(st.text(max_size=4), st.integers()), max_size=3),
    st.dictionaries(st.text(), st.none()),
)  # fmt: skip
COLUMNS = st.sampled_from(
    ["path", "file_name", "label", "caption", "captions", "text", "image", "Title", "x"]
)


ROWS = st.builds(
    lambda usual, odd: usual | odd,
    st.sampled_from(
        [{"path": "a.jpg"}, {"path": "a.jpg", "label": 3}, {"path": "a.jpg", "caption": "x"}, {}]
    ),
    st.dictionaries(COLUMNS.filter(lambda name: name != "path"), CELLS, max_size=2),
)


@FUZZ
@given(rows=st.lists(ROWS, max_size=4), skip=st.sampled_from([0, 9, 9]))
def test_rows_of_any_type(place: Path, rows: list[dict[str, object]], skip: int) -> None:
    place.mkdir(exist_ok=True)
    (place / "a.jpg").write_bytes(PICTURE)
    table = place / "table.jsonl"
    table.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows))
    require_sound(table, place / "out", skip_broken=skip)


TABLES = {
    ".csv": b'path,caption,label\na.jpg,"one, two",0\nb.jpg,\xc3\xa9,1\na.jpg,,0\n',
    ".tsv": b"filepath\ttitle\na.jpg\tone two\nb.jpg\t\xe2\x80\xa8\n",
    ".jsonl": b'{"path": "a.jpg", "caption": ["x", "y"]}\n{"path": "b.jpg", "caption": "\\ud83d"}\n',
}


def parquet() -> bytes:
    """A table of two pictures' paths, captions and labels."""
    rows = {"path": ["a.jpg", "b.jpg"], "caption": [["x", "y"], []], "label": [0, 1]}
    memory = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(rows), memory)
    return memory.getvalue()


TABLES[".parquet"] = parquet()


@FUZZ
@given(data=st.data(), ending=st.sampled_from(sorted(TABLES)))
def test_tables_of_any_bytes(place: Path, data: st.DataObject, ending: str) -> None:
    place.mkdir(exist_ok=True)
    for name in ("a.jpg", "b.jpg"):
        (place / name).write_bytes(PICTURE)
    table = place / f"table{ending}"
    table.write_bytes(data.draw(mutations(TABLES[ending])))
    require_sound(table, place / "out", skip_broken=9)


@FUZZ
@given(data=st.one_of(mutations("cat\r\ndog\n\u732b\n".encode()), st.binary(max_size=60)))
def test_class_files_of_any_bytes(place: Path, data: bytes) -> None:
    """Names that can be numbered and printed, or our own error in a line."""
    place.mkdir(exist_ok=True)
    (place / "classes.txt").write_bytes(data)
    try:
        names = read_classes(place / "classes.txt")
    except DataError as error:
        assert "\n" not in str(error) and "classes.txt" in str(error)
    else:
        assert names and all(name and name == name.strip() for name in names)
        "".join(names).encode()
