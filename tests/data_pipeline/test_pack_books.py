"""Books that balance: random folders and tables, counted by a plain reference beside what was packed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline.books import Books
from data_pipeline.pack import pack
from tests.data_pipeline.sets import sample
from tests.data_pipeline.test_pack_folder import left_out, samples

PICTURE = sample(1, side=2)["png"]
FOLDERS = st.sampled_from(["a", "b.c", "é", "\udce9", ".h", "@eaDir", "deep"])
FILES = st.sampled_from(
    *[["0.png", "1.JPG", "2.tiff", ".3.png", "._0.png", "4", "5.md", "0.txt", "1.json", "6.heic", "7.png"]]
)
TREES = st.sets(
    st.tuples(st.lists(FOLDERS, max_size=3), FILES).map(lambda one: (*one[0], one[1])), max_size=14
)


def hides(name: str) -> bool:
    return name.startswith(".") or name == "@eaDir"


def reference(tree: set[tuple[str, ...]]) -> tuple[set[str], set[str]]:
    """The pictures that must come out, and the texts that go with them; nothing where it must be refused."""
    seen = {path for path in tree if not any(map(hides, path))}
    pictures = {path for path in seen if path[-1].endswith((".png", ".JPG", ".tiff"))}
    stems = {(*path[:-1], path[-1].partition(".")[0]) for path in pictures}
    texts = {path for path in seen if path[-1].endswith((".txt", ".json"))}
    texts = {path for path in texts if (*path[:-1], path[-1].partition(".")[0]) in stems}
    classes = {path[0] for path in tree if len(path) > 1 and not hides(path[0])}
    filled = {path[0] for path in pictures if len(path) > 1}
    if not pictures or (filled and (classes != filled or any(len(path) == 1 for path in pictures))):
        return set(), set()
    return {"/".join(path) for path in pictures}, {"/".join(path) for path in texts}


@settings(max_examples=120, deadline=None)
@given(TREES)
def test_every_file_of_a_folder_is_accounted_for(tree: set[tuple[str, ...]]) -> None:
    pictures, texts = reference(tree)
    with tempfile.TemporaryDirectory() as place:
        for path in tree:
            file = Path(place, "in", *path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"{}" if path[-1].endswith((".txt", ".json")) else PICTURE)
        Path(place, "in").mkdir(exist_ok=True)
        try:
            manifest = pack(Path(place, "in"), Path(place, "out"), per_shard=3)
        except DataError:
            assert not pictures and [path.name for path in Path(place).iterdir()] == ["in"]
            return
        found = samples(manifest)
        assert set(found) == pictures
        assert sum(len({"txt", "json"} & fields.keys()) for fields in found.values()) >= len(texts)
        books = Books.from_dict(manifest.about["books"])
        assert books.balance and books.offered == len(tree)
        assert books.taken == len(pictures) + len(texts)
        assert sum(left_out(manifest).values()) == len(tree) - len(pictures) - len(texts)


PATHS = st.sampled_from(
    ["0.png", "1.png", "gone.png", "", None, 5, "a\\b.png", "http://x/y.png", "bad.png", "0\0"]
)
CAPTIONS = st.sampled_from(["a", "", None, 5, True, ["a", "b"], [], [1], {"en": "a"}, "\ud83d", float("nan")])
LABELS = st.sampled_from([0, 3, 7.0, "2", -1, None, "", -5, 2**40, 0.5, [1]])


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(PATHS, CAPTIONS, LABELS), min_size=1, max_size=8))
def test_every_row_of_a_table_is_accounted_for(rows: list[tuple[object, object, object]]) -> None:
    def good(path: object, caption: object, label: object) -> bool:
        texts = caption if isinstance(caption, list) else [caption]
        spoken = (
            caption is None or isinstance(caption, int | float) or all(isinstance(one, str) for one in texts)
        )
        return (
            path in ("0.png", "1.png")
            and (spoken and caption is not True and caption != "\ud83d")
            and label in (0, 3, 7, "2", -1, None, "")
        )

    expected = [row for row in rows if good(*row)]
    known = [row for row in rows if row[2] not in (-1, None, "")]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for picture in ("0.png", "1.png"):
            (place / picture).write_bytes(PICTURE)
        (place / "bad.png").write_bytes(b"nonsense")
        keys = ("path", "caption", "label")
        table = place / "t.jsonl"
        table.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
        try:
            manifest = pack(table, place / "out", per_shard=3, skip_broken=len(rows), shuffle_seed=None)
        except DataError:
            assert not expected or not known
            return
        books = Books.from_dict(manifest.about["books"])
        assert books.balance and (books.offered, books.taken) == (len(rows), len(expected))
        assert manifest.samples == len(expected) and len(manifest.about.get("broken", ())) == len(rows) - len(
            expected
        )
        spoken = [row for row in expected if row[1] not in (None, "", []) and row[1] == row[1]]
        assert Books.from_dict(manifest.about["captions"]).taken == len(spoken)
        manifest_labels = left_out(manifest, "labels")
        assert sum(manifest_labels.values()) == sum(row[2] in (-1, None, "") for row in rows)
