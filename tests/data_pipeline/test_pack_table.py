"""Tables to shards: which columns are used, what a caption and a label may be, and that no row is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from configs.errors import DataError
from data_pipeline.entries import SourceOptions
from data_pipeline.label_numbers import labels
from data_pipeline.manifest import Manifest
from data_pipeline.pack import account, pack
from data_pipeline.stats import stats
from data_pipeline.verify import verify
from tests.data_pipeline.test_pack_folder import left_out, picture, samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        picture(tmp_path / "in" / f"{number}.png", number)
    return tmp_path / "in"


def json_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def packed(folder: Path, content: str | bytes, ending: str = "csv", **reading: object) -> Manifest:
    table = folder / f"t.{ending}"
    table.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
    number = len(list(folder.parent.glob("out*")))
    return pack(table, folder.parent / f"out{number}", reading=SourceOptions(**reading))  # type: ignore[arg-type]


def field(manifest: Manifest, name: str) -> dict[str, str | None]:
    """A field of each sample, by its picture's name without ending."""
    found = samples(manifest)
    return {
        Path(one).stem: fields[name].decode() if name in fields else None for one, fields in found.items()
    }


@pytest.mark.parametrize(
    ("heading", "separator", "ending"),
    [
        ("filepath,title,category", ",", "csv"),
        ("filepath\ttitle\tcategory", "\t", "csv"),  # open_clip's own
        ("Image_Path;TEXT;Class", ";", "csv"),
        ("file_name,text,label", ",", "tsv"),
        ("image\tsentence\tcls", "\t", "tsv"),
        ('"path" , "caption" , "target"', ",", "csv"),
    ],
)
def test_columns_by_the_names_that_others_give(
    folder: Path, heading: str, separator: str, ending: str
) -> None:
    heading = heading.replace(" , ", ",")
    rows = [separator.join((f"{n}.png", f"number {n}", str(n % 2))) for n in range(3)]
    manifest = packed(folder, "\n".join([heading, *rows]), ending)
    assert field(manifest, "txt") == {str(n): f"number {n}" for n in range(3)}
    assert field(manifest, "cls") == {str(n): str(n % 2) for n in range(3)}
    names = [name.strip('"') for name in heading.split(separator)]
    assert (
        f"columns: pictures from {names[0]}, captions from {names[1]}, labels from {names[2]}; not used: none"
        in account(manifest)
    )


def test_columns_by_option_and_those_that_arent_used(folder: Path) -> None:
    table = "id,path,caption,label,where,words,kind\n7,x.png,no,9,0.png,yes,2\n"
    manifest = packed(folder, table, path_column="where", caption_column="words", label_column="kind")
    assert field(manifest, "txt") == {"0": "yes"} and field(manifest, "cls") == {"0": "2"}
    assert any("not used: id, path, caption, label" in line for line in account(manifest))
    for option in ("path", "caption", "label"):
        with pytest.raises(DataError, match=f"--{option}-column: no column 'gone'; its columns are id, path"):
            packed(folder, table, **{f"{option}_column": "gone"})
    with pytest.raises(DataError, match=r"no column of paths; .* URLs have to be fetched first"):
        packed(folder, "url,caption\nhttp://x/0.png,a\n")


def test_a_column_that_only_later_rows_have_is_used(folder: Path) -> None:
    content = '\ufeff{"path": "0.png"}\n\n{"path": "1.png", "caption": "one"}\n'
    assert field(packed(folder, content, "jsonl"), "txt") == {"0": None, "1": "one"}


def test_several_captions_are_drawn_from(folder: Path) -> None:
    rows = [
        {"path": "0.png", "captions": ["zero", " ", "nought"]},
        {"path": "1.png", "captions": "one"},
        {"path": "2.png", "captions": []},
        {"path": "3.png", "captions": None},
    ]
    manifest = pack(json_lines(folder / "t.jsonl", rows), folder.parent / "out")
    found = {name: json.loads(text)["captions"] for name, text in field(manifest, "json").items() if text}
    assert found == {"0": ["zero", "nought"], "1": ["one"]}
    assert left_out(manifest, "captions") == {"missing or empty": 2}
    assert any("data.captions=[json.captions]" in line for line in account(manifest))


def test_a_caption_is_a_text_a_number_or_a_list_of_texts(folder: Path) -> None:
    odd = [5, 2.5, float("nan"), {"en": "x"}, True, ["a", 1], ["a", None], "half \ud83d"]
    rows = [{"path": f"{n % 6}.png", "caption": caption} for n, caption in enumerate(odd)]
    table = folder / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as raised:
        pack(table, folder.parent / "out")
    lines = str(raised.value).splitlines()
    for row, what in ((4, "dict"), (5, "bool"), (6, "int"), (7, "NoneType")):
        assert any(f"row {row}: " in line and f"of type {what}; a caption is" in line for line in lines), row
    assert any("row 8: " in line and "half of a surrogate pair" in line for line in lines)
    assert len(lines) == 6 and "5 of 8 can't be packed" in lines[-1]
    manifest = pack(table, folder.parent / "out", skip_broken=5)
    assert field(manifest, "txt") == {"0": "5", "1": "2.5", "2": None}
    assert len(manifest.about["broken"]) == 5 and left_out(manifest)["broken (--skip-broken)"] == 5


def test_captions_of_any_signs_are_carried_through(folder: Path) -> None:
    odd = ["a\u2028b", "a\u0085b\x0c", 'he said "x", twice', "two\nlines", "漢字 🐈", "x" * 200_000]
    rows = [{"path": f"{n}.png", "caption": caption} for n, caption in enumerate(odd)]
    expected = {str(n): caption for n, caption in enumerate(odd)}
    lines = pack(json_lines(folder / "t.jsonl", rows), folder.parent / "lines")
    assert field(lines, "txt") == expected
    quoted = ['"' + caption.replace('"', '""') + '"' for caption in odd]
    table = "path,caption\n" + "".join(f"{n}.png,{caption}\n" for n, caption in enumerate(quoted))
    assert field(packed(folder, table), "txt") == expected


def test_lists_spelt_as_text_get_a_word(folder: Path) -> None:
    said = account(packed(folder, "path,caption\n0.png,\"['a', 'b']\"\n"))
    assert any("look like lists spelt as text" in line for line in said)


@pytest.mark.parametrize(
    ("cells", "numbers", "classes"),
    [
        (["0.0", "2.0", "1", " 3 "], [0, 2, 1, 3], ("0", "1", "2", "3")),
        ([10, 2.0, 9, 0], [10, 2, 9, 0], tuple(map(str, range(11)))),
        (["0", "-1", "2", ""], [0, None, 2, None], ("0", "1", "2")),
        ([0.0, float("nan"), None], [0, None, None], ("0",)),
        (["dog", "cat", "-1", None], [1, 0, None, None], ("cat", "dog")),
        (["12", "30000000"], [12, 30_000_000], ()),
        (["999"], [999], tuple(map(str, range(1000)))),
        (["7up", "٣"], [0, 1], ("7up", "٣")),
    ],
)
def test_numbers_stay_numbers(
    cells: list[object], numbers: list[int | None], classes: tuple[str, ...]
) -> None:
    found = labels(cells, Path("t"), (), False)
    assert (found.numbers, found.classes, found.wrong) == (numbers, classes, {})


def test_labels_by_name_on_request_and_by_a_list() -> None:
    ids = [4006381333931, "12", 7, -1]
    found = labels(ids, Path("t"), (), True)
    assert found.numbers == [3, 2, 1, 0] and found.classes == ("-1", "7", "12", "4006381333931")
    found = labels(["dog", "newt", None], Path("t"), ("newt", "cat", "dog"), False)
    assert found.numbers == [2, 0, None] and found.classes == ("newt", "cat", "dog")
    found = labels([1, 0], Path("t"), ("newt", "cat", "cat"), False)
    assert found.numbers == [1, 0] and found.classes == ("newt", "cat", "cat")
    for cells, classes, named in (
        (["cat", "5"], (), "row 2 has the number 5 for a label, row 1 the name 'cat'"),
        (["cat", "bird"], ("cat",), "labels bird aren't in the list of classes; it has cat"),
        (["crane"], ("crane", "crane"), "'crane' twice, as 0 and 1"),
        ([None, ""], (), "row 1: its label is empty, and so is every other"),
    ):
        with pytest.raises(DataError, match=named):
            labels(cells, Path("t"), classes, False)


@pytest.mark.parametrize("cell", [2**31, -2, "99999999999", "0" * 5000, 0.5, True, [1], {"a": 1}, b"x"])
def test_what_is_no_label_is_said_with_its_row(cell: object) -> None:
    found = labels([0, cell, 1], Path("t"), (), False)
    assert list(found.wrong) == [1] and "its label" in found.wrong[1] and found.classes == ("0", "1")


def test_huge_labels_cost_nothing(folder: Path) -> None:
    manifest = packed(folder, "path,label\n0.png,12\n1.png,2147483647\n")
    assert field(manifest, "cls") == {"0": "12", "1": "2147483647"} and manifest.classes == ()
    assert manifest.path.stat().st_size < 5000 and verify(manifest).whole
    assert any("labels go up to 2147483647, but only 2" in line for line in account(manifest))
    assert stats(manifest).labels == {"12": 1, "2147483647": 1}
    named = packed(folder, "path,label\n0.png,12\n1.png,4006381333931\n", labels_as_names=True)
    assert field(named, "cls") == {"0": "0", "1": "1"} and named.classes == ("12", "4006381333931")


def test_a_row_that_breaks_is_named_and_no_row_is_lost(folder: Path) -> None:
    (folder / "none").write_bytes((folder / "0.png").read_bytes())
    (folder / "dir.png").mkdir()
    rows = [
        ("0.png,a dog, sitting", "has 3 cells, but there are 2 columns"),
        ("1.png", "has 1 cells"),
        (",words", "its path is empty"),
        ("https://x.org/a.png,words", "https://x.org/a.png: a URL; pictures are packed from files"),
        ("file:///a.png,words", "write the path without file://"),
        ("img\\2.png,words", "write / where it has"),
        ("~/2.png,words", "~ isn't expanded"),
        (" 2.png,words", "with white space around it"),
        ("gone.png,words", "no such picture, though the table names it; paths are relative to"),
        ("dir.png,words", "is a folder"),
        ("2\0.png,words", "embedded null byte"),
        (f"{'x' * 300},words", "can't be read: File name too long"),
        ("t.csv,words", "can't be read as a picture|not a picture"),
    ]
    content = "\n".join(["path,caption", "none,no ending", *[row for row, _ in rows], "3.png,last"])
    with pytest.raises(DataError) as raised:
        packed(folder, content)
    lines = str(raised.value).splitlines()
    for number, (row, what) in enumerate(rows, 2):
        assert any(
            f"row {number}: " in line and any(one in line for one in what.split("|")) for line in lines
        ), row
    assert len(lines) == len(rows) + 1 and f"{len(rows)} of {len(rows) + 2} can't be packed" in lines[-1]
    manifest = pack(folder / "t.csv", folder.parent / "out", skip_broken=len(rows))
    assert field(manifest, "txt") == {"none": "no ending", "3": "last"}


@pytest.mark.parametrize(
    ("content", "ending", "named"),
    [
        ('path,caption\n0.png,"never closed\n1.png,b\n', "csv", r"line 3: .*put a text with quotes"),
        ("path,a,a\n0.png,1,2\n", "csv", "two columns are called 'a'"),
        ("path\n0.png\n".encode("utf-16"), "csv", "it is UTF-16; save it as UTF-8"),
        ("", "csv", "no column of paths"),
        ("path\n", "csv", "a table without rows"),
        ("\n\n", "jsonl", "no column of paths"),
        ("[" * 100_000, "jsonl", "row 1: isn't JSON"),
        (b"\0\1\2", "parquet", "can't be read as parquet"),
    ],
)
def test_tables_that_cant_be_read(folder: Path, content: str | bytes, ending: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        packed(folder, content, ending)
    assert not list(folder.parent.glob(".out*"))


def test_a_parquet_that_breaks_off_inside_is_one_line(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"path": [f"{n}.png" for n in range(500)]})
    parquet.write_table(table, folder / "t.parquet", compression="none", use_dictionary=False)
    data = bytearray((folder / "t.parquet").read_bytes())
    data[4:400] = bytes(396)  # the footer stays whole
    with pytest.raises(DataError, match=r"t\.parquet: can't be read") as raised:
        packed(folder, bytes(data), "parquet")
    assert len(str(raised.value).splitlines()) == 1


def test_paths_are_bytes(folder: Path) -> None:
    (folder / "0.png").rename(folder / "caf\udce9.png")
    (folder / "1.png").rename(folder / "日\u2028本.png")
    manifest = packed(folder, "path,label\ncaf\udce9.png,\udce9\n日\u2028本.png,b\n")
    assert set(samples(manifest)) == {"caf\udce9.png", "日\u2028本.png"}
    assert manifest.classes == ("b", "\udce9") and Manifest.load(manifest.path).classes == manifest.classes
    with pytest.raises(DataError, match="isn't UTF-8 text"):
        packed(folder, b"path,caption\n2.png,caf\xe9\n")


def test_a_hubs_parquet_holds_the_pictures_itself(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [(folder / f"{n}.png").read_bytes() for n in range(5)]
    held = [{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(data)]
    held[3]["path"], held[4]["bytes"] = None, None
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"image": held, "label": [0, 1, 0, 1, 0], "text": list("abcde")})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, folder / "t.parquet", row_group_size=2)
    with pytest.raises(DataError, match="row 5: holds no bytes of a picture"):
        pack(folder / "t.parquet", folder.parent / "out", per_shard=2)
    manifest = pack(folder / "t.parquet", folder.parent / "out", per_shard=2, processes=2, skip_broken=1)
    found = samples(manifest)
    assert [found[name]["png"] for name in ("0.png", "1.png", "2.png", "row 4")] == data[:4]
    assert found["row 4"]["cls"] == b"1" and manifest.classes == ("cat", "dog") and verify(manifest).whole
    parquet.write_table(pyarrow.table({"image": data[:2]}), folder / "plain.parquet")
    assert pack(folder / "plain.parquet", folder.parent / "plain").samples == 2
