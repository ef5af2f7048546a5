"""`keel data pack` begins at once: neither it nor its workers import torch or what imports it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import webdataset

from data_pipeline.pack import pack
from data_pipeline.shards import write_samples
from tests.data_pipeline.test_pack_folder import picture
from tests.places import full_disk_environment

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "timm",
    "webdataset",
    "deepspeed",
    "accelerate",
    "sklearn",
    "scipy",
    "pyarrow",
    "tokenizers",
)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "launch", "data", "pack", *words]


def test_nothing_heavy_is_imported_in_any_process(tmp_path: Path) -> None:
    """In place of the libraries stand modules that break."""
    for number in range(4):
        picture(tmp_path / "in" / "ab"[number % 2] / f"{number}.png", number)
    for name in HEAVY:
        (tmp_path / "light" / name).mkdir(parents=True)
        (tmp_path / "light" / name / "__init__.py").write_text("raise ImportError('a heavy library')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'light'}{os.pathsep}{ROOT}"}
    for words in (["--processes", "2"], ["--processes", "1", "--no-check"]):
        done = subprocess.run(
            command("in", "--out", f"out{len(words)}", "--per-shard", "1", *words),
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    heavy = [sys.executable, "-c", "import torch"]
    assert subprocess.run(heavy, env=environment, capture_output=True).returncode == 1, (
        "the check would see it"
    )


def test_shards_are_byte_for_byte_webdatasets_own() -> None:
    rows = [
        ("000001", {"jpg": b"x" * 1000, "cls": b"3", "a.b": b""}),
        ("a/é", {"png": b"y" * 512}),
        ("x" * 80, {"txt": b""}),
        ("y/" + "z" * 70, {"webp": b"z" * 70_000, "json": b"{}"}),
    ]
    own, theirs = io.BytesIO(), io.BytesIO()
    assert write_samples(own, rows) == len(rows)
    with webdataset.TarWriter(theirs, encoder=False, mtime=0, user="keel", group="keel") as writer:
        for key, fields in rows:
            writer.write({"__key__": key, **fields})
    assert own.getvalue() == theirs.getvalue()


def test_a_disk_that_fills_up_in_a_worker_is_one_line(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "in" / f"{number}.png", number)
    (tmp_path / "disk").mkdir()
    words = ("in", "--out", "disk/out", "--per-shard", "1", "--processes", "2")
    environment = full_disk_environment(tmp_path / "hook", tmp_path / "disk", 14)
    done = subprocess.run(command(*words), cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "disk/out: can't be written: No space left on device" in lines[0]
    assert not (tmp_path / "disk" / "out").exists()
    assert pack(tmp_path / "in", tmp_path / "disk" / "out", per_shard=1).samples == 6


def test_plain_folders_and_tables_keep_their_hash(tmp_path: Path) -> None:
    """What was packed before endings, links and captions of more kinds were read is found again."""
    names = []
    for number in range(7):
        ending = ("jpg", "png", "JPEG", "ppm")[number % 4]
        name = Path(("cat", "dog b", "é")[number % 3], ("x", "")[number % 2], f"{number}.{ending}")
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"P6 2 2 255\n" + bytes(range(number, number + 12)))
        names.append(name)
    rows = [f"in/{name},{number + 1},caption {number}" for number, name in enumerate(sorted(names))]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,caption", *rows]))
    mixed = pack(tmp_path / "in", tmp_path / "a", per_shard=3)
    ordered = pack(tmp_path / "in", tmp_path / "b", per_shard=3, shuffle_seed=None)
    table = pack(tmp_path / "t.csv", tmp_path / "c", per_shard=3)
    assert mixed.hash == "5e42650edf7134aac9817f12834f6567e14d21fec73f4139ec67a5bb3d9fe63c"
    assert ordered.hash == "d38a0d4af008a00ec577c66824bea221dbc360f0a74418c3b619342360c7271d"
    assert table.hash == "fcad98803575b40fec82c07cc41fa4902099cfa73d731c39c66830027f91fd99"
