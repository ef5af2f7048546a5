"""Folders to shards: every ending that is read, links, copies that systems make, any names, texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from data_pipeline.books import Books
from data_pipeline.decode import decode
from data_pipeline.entries import SourceOptions
from data_pipeline.fields import IMAGE_FIELDS
from data_pipeline.manifest import Manifest
from data_pipeline.pack import account, pack
from data_pipeline.read import Reader
from data_pipeline.verify import verify
from tests.data_pipeline.sets import encoded
from tests.places import unprivileged


def picture(path: Path, colour: int = 0, kind: str = "PNG") -> Path:
    """A small picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(np.full((4, 6, 3), colour, np.uint8), kind))
    return path


def names(manifest: Manifest) -> dict[str, str]:
    """What the source called each sample, by key."""
    lines = (manifest.directory / "names.jsonl").read_bytes().split(b"\n")
    return {one["key"]: one["name"] for one in map(json.loads, filter(None, lines))}


def samples(manifest: Manifest) -> dict[str, dict[str, bytes]]:
    """The fields of each sample, by what the source called it."""
    reader, found, called = Reader(manifest), {}, names(manifest)
    for shard in range(len(manifest.shards)):
        index = manifest.index(shard)
        for row, key in enumerate(index.keys()):
            found[called[key]] = dict(reader.read(shard, row, [], index.fields))
    reader.close()
    assert len(found) == len(called) == manifest.samples
    return found


def left_out(manifest: Manifest, name: str = "books") -> dict[str, int]:
    books = Books.from_dict(manifest.about[name])
    assert books.balance
    return {reason: left.count for reason, left in books.left_out.items()}


KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "jfif", "pjpeg", "mpo", "JPG"), "JPEG"),
    **dict.fromkeys(("tif", "tiff"), "TIFF"),
    **dict.fromkeys(("avif", "avifs"), "AVIF"),
    **dict.fromkeys(("jp2", "jpx"), "JPEG2000"),
    **{"png": "PNG", "apng": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "ppm": "PPM", "pnm": "PPM"},
}


def test_every_kind_of_picture_is_packed_and_read(tmp_path: Path) -> None:
    for number, (ending, kind) in enumerate(KINDS.items()):
        picture(tmp_path / "in" / f"{number}.{ending}", 10 * number, kind)
    manifest = pack(tmp_path / "in", tmp_path / "out")
    assert manifest.samples == len(KINDS) and verify(manifest).whole
    assert set(manifest.fields) <= set(IMAGE_FIELDS) and {"jpg", "tif", "avif", "jp2"} <= set(manifest.fields)
    assert not {"jpeg", "jfif", "tiff"} & set(manifest.fields), "a kind of file has one name in a shard"
    for name, fields in samples(manifest).items():
        ((field, data),) = fields.items()
        number = int(Path(name).stem)
        assert data == (tmp_path / "in" / name).read_bytes()
        assert abs(decode(data).astype(int) - 10 * number).max() < 12, (name, field)


def test_hidden_copies_are_left_out_on_every_level(tmp_path: Path) -> None:
    for kept in ("cat/0.png", "cat/deep/er/1.png", "dog/2.png"):
        picture(tmp_path / "in" / kept)
    for copy in (
        *(".hidden/0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/deep/@eaDir/1.png/SYNO.png"),
        *("cat/._0.png", "dog/.2.png", "__MACOSX/cat/._0.png", "lost+found/#1.png", "dog/.cache/a/b/c.png"),
    ):
        picture(tmp_path / "in" / copy)
    manifest = pack(tmp_path / "in", tmp_path / "out")
    assert set(samples(manifest)) == {"cat/0.png", "cat/deep/er/1.png", "dog/2.png"}
    assert manifest.classes == ("cat", "dog")
    ((reason, count),) = left_out(manifest).items()
    assert reason.startswith("hidden") and count == 8
    assert any("8 files left out: hidden" in line for line in account(manifest))


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    for name in ("in/cat/0.png", "more/1.png", "more/deep/2.png", "dogs/3.png", "one.png"):
        picture(tmp_path / name)
    cat = tmp_path / "in" / "cat"
    (cat / "more").symlink_to(tmp_path / "more")
    (cat / "again").symlink_to(tmp_path / "more" / "deep")
    (tmp_path / "in" / "dog").symlink_to(tmp_path / "dogs")
    (cat / "one.png").symlink_to(tmp_path / "one.png")
    (cat / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (cat / "self.png").symlink_to("self.png")
    for loop, target in {"up": "..", "here": ".", "all": "/"}.items():
        (cat / loop).symlink_to(target)
    (tmp_path / "more" / "back").symlink_to(cat)
    (tmp_path / "in" / "loop").symlink_to(".")
    manifest = pack(tmp_path / "in", tmp_path / "out")
    found = samples(manifest)
    assert {Path(name).name for name in found} == {"0.png", "1.png", "2.png", "3.png", "one.png"}
    assert len(found) == 5 and manifest.classes == ("cat", "dog")
    # up, here, all, loop, more/back, and one of the two ways to more/deep
    assert left_out(manifest) == {
        "behind a link to a folder that is read already": 6,
        "a link that leads nowhere": 2,
    }


def test_what_isnt_a_readable_picture_is_counted_by_reason(tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.heic", "cat/2.png", "cat/shut/3.png", "cat/shut/4.png"):
        picture(tmp_path / "in" / name)
    for name in ("readme.md", "cat/list.csv", "cat/notes.txt", "cat/0", "cat/x." + "y" * 40):
        (tmp_path / "in" / name).write_text("a\n")
    os.mkfifo(tmp_path / "in" / "cat" / "pipe.png")
    (tmp_path / "in" / "cat" / "2.png").chmod(0)
    (tmp_path / "in" / "cat" / "shut").chmod(0)
    command = [*unprivileged(), sys.executable, "-m", "launch", "data", "pack", "in", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    (tmp_path / "in" / "cat" / "shut").chmod(0o755)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(tmp_path / "out")
    assert set(samples(manifest)) == {"cat/0.png"}
    assert left_out(manifest) == {
        "can't be read (Permission denied)": 1,
        "in a folder that can't be listed (Permission denied)": 1,
        "ending .heic, a kind of picture that isn't read; convert them": 1,
        "a pipe, socket or device": 1,
        "ending .md": 1,
        "ending .csv, a table; to pack by it, name it in place of the folder": 1,
        "ending .txt": 1,
        "no ending": 1,
        "an ending that no picture has": 1,
    }
    for line in account(manifest):
        assert f"note: {line}" in done.stderr.splitlines()
    strict = subprocess.run(
        [*command[:-1], "strict", "--strict"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert strict.returncode == 2 and "ending .heic" in strict.stderr and "Traceback" not in strict.stderr
    assert not (tmp_path / "strict").exists() and not (tmp_path / ".strict.part").exists()


def test_names_are_bytes(tmp_path: Path) -> None:
    odd = [os.fsdecode(b"caf\xe9"), "a b", "q'\"%=\\", "ü", "日本語" * 20, "new\nline", "x" * 200]
    for number, name in enumerate(odd):
        picture(tmp_path / "in" / name / f"{name[:60]}.png", number)
    manifest = pack(tmp_path / "in", tmp_path / "out", per_shard=2)
    assert manifest.classes == tuple(sorted(odd)) and verify(manifest).whole
    assert Manifest.load(tmp_path / "out").hash == manifest.hash
    for name, fields in samples(manifest).items():
        assert fields["png"] == Path(os.fsdecode(os.fsencode(tmp_path / "in" / name))).read_bytes()
        assert manifest.classes[int(fields["cls"])] == name.split("/")[0]


def test_a_bad_picture_of_any_name_is_said_on_one_line(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "0.png")
    (tmp_path / "in" / os.fsdecode(b"\xe9\nt.png")).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="bad picture: not a picture") as raised:
        pack(tmp_path / "in", tmp_path / "out")
    first, last = str(raised.value).splitlines()
    assert r"\udce9\nt.png" in first and "--skip-broken 1" in last
    first.encode()


def test_texts_beside_pictures_go_with_them(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / "in" / f"0000{number % 2}" / f"{number}.png", number)
    (tmp_path / "in" / "00000" / "0.txt").write_bytes(b"\xef\xbb\xbfeine \xc3\x84hre")
    (tmp_path / "in" / "00000" / "0.caption").write_text("second choice")
    (tmp_path / "in" / "00001" / "1.json").write_text('{"caption": "one", "x": NaN}')
    (tmp_path / "in" / "00000" / "2.txt").write_text(" \n")
    (tmp_path / "in" / "00000" / "99.txt").write_text("of no picture")
    manifest = pack(tmp_path / "in", tmp_path / "out")
    found = {Path(name).stem: fields for name, fields in samples(manifest).items()}
    assert found["0"]["txt"].decode() == "eine Ähre" and found["1"]["json"].startswith(b'{"caption"')
    assert set(found["2"]) == set(found["3"]) == {"png"}, "an empty text is none"
    assert manifest.classes == (), "folders of a download aren't classes"
    assert any("00000, 00001 are taken for the parts of a download" in line for line in account(manifest))
    assert left_out(manifest) == {"ending .caption": 1, "ending .txt": 1}
    assert left_out(manifest, "captions") == {"missing or empty": 2} and verify(manifest).whole
    as_classes = pack(tmp_path / "in", tmp_path / "classes", reading=SourceOptions(class_folders=True))
    assert as_classes.classes == ("00000", "00001")
    without = pack(tmp_path / "in", tmp_path / "without", reading=SourceOptions(sidecars=False))
    assert without.fields == ("png",) and left_out(without) == {
        "ending .txt": 3, "ending .caption": 1, "ending .json": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), [("0.txt", b"caf\xe9"), ("0.json", b"{"), ("0.json", b"[" * 9999)]
)
def test_a_text_that_cant_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    picture(tmp_path / "in" / "0.png")
    picture(tmp_path / "in" / "1.png")
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"0.png: {name} beside it isn't"):
        pack(tmp_path / "in", tmp_path / "out")
    assert left_out(pack(tmp_path / "in", tmp_path / "out", skip_broken=1)) == {"broken (--skip-broken)": 1}


def test_a_hubs_folder_is_packed_by_its_table(tmp_path: Path) -> None:
    for name in ("0.png", "deep/1.png", "2.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in" / "metadata.csv").write_text("file_name,text\n0.png,zero\ndeep/1.png,one\n")
    manifest = pack(tmp_path / "in", tmp_path / "out")
    assert {name: fields["txt"] for name, fields in samples(manifest).items()} == {
        "0.png": b"zero", "deep/1.png": b"one",
    }  # fmt: skip
    assert left_out(manifest, "files") == {"not named in metadata.csv": 1}
    with pytest.raises(DataError, match=r"1 files left out: not named in metadata\.csv .for instance 2\.png"):
        pack(tmp_path / "in", tmp_path / "strict", strict=True)
    (tmp_path / "in" / "metadata.csv").write_text("something,else\n1,2\n")
    plain = pack(tmp_path / "in", tmp_path / "plain", reading=SourceOptions(class_folders=False))
    assert plain.samples == 3 and not (tmp_path / "strict").exists()


def test_parts_of_a_set_as_classes_get_a_word(tmp_path: Path) -> None:
    for name in ("train/cat/0.png", "val/cat/1.png"):
        picture(tmp_path / "in" / name)
    said = account(pack(tmp_path / "in", tmp_path / "out"))
    assert any("the classes are called train, val" in line and "SOURCE/train" in line for line in said)


def test_a_list_of_classes_gives_their_order(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/1.png"):
        picture(tmp_path / "in" / name)
    order = SourceOptions(classes=("dog", "newt", "cat"))
    manifest = pack(tmp_path / "in", tmp_path / "out", reading=order)
    assert manifest.classes == order.classes
    assert {name: fields["cls"] for name, fields in samples(manifest).items()} == {
        "cat/0.png": b"2", "dog/1.png": b"0",
    }  # fmt: skip
    with pytest.raises(DataError, match="class folders dog aren't in the list of classes; it has cat"):
        pack(tmp_path / "in", tmp_path / "other", reading=SourceOptions(classes=("cat",)))


def test_packing_into_its_own_source_again_and_again(tmp_path: Path) -> None:
    for name in ("in/cat/0.png", "in/dog/1.png"):
        picture(tmp_path / name)
    first = pack(tmp_path / "in", tmp_path / "in" / "packed")
    second = pack(tmp_path / "in", tmp_path / "in" / "second")
    assert first.hash == second.hash and first.classes == ("cat", "dog") and left_out(first) == {}
    assert left_out(second) == {"part of a data set that was packed": 4}
