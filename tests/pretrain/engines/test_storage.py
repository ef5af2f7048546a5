"""The checkpoint folder on its own: any cut, any read, and damage found before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import RunError
from pretrain.engines import storage
from pretrain.engines.storage import Fragment, Reader


def write(directory: Path, tensor: torch.Tensor, cuts: list[int]) -> None:
    """`tensor` cut at `cuts`, a file for every part."""
    directory.mkdir(parents=True, exist_ok=True)
    flat, total = tensor.reshape(-1), tensor.numel()
    edges = [0, *sorted(cuts), total]
    files = [
        storage.write_fragments(directory, rank, [Fragment("model/w", flat[a:b], a, total)])
        for rank, (a, b) in enumerate(pairwise(edges))
    ]
    storage.write_index(directory, files, {"model/w": list(tensor.shape)}, {"note": 1})


@settings(max_examples=60, deadline=None)
@given(data=st.data(), total=st.integers(1, 40))
def test_any_slice_of_any_cut_reads_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, total: int
) -> None:
    directory = tmp_path_factory.mktemp("c")
    tensor = torch.arange(total, dtype=torch.float32)
    write(directory, tensor, data.draw(st.lists(st.integers(0, total), max_size=5)))
    start = data.draw(st.integers(0, total))
    length = data.draw(st.integers(0, total - start))
    reader = Reader(directory)
    assert torch.equal(reader.read("model/w", start, length), tensor[start : start + length])
    assert torch.equal(reader.whole("model/w"), tensor)
    assert storage.damage(directory) is None


def test_dtypes_and_shapes_survive(tmp_path: Path) -> None:
    for number, tensor in enumerate(
        (torch.tensor(7), torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor([[True, False]]))
    ):
        write(tmp_path / str(number), tensor, [])
        assert torch.equal(storage.read_model(tmp_path / str(number))["w"], tensor)


def test_damage_is_found_by_file(tmp_path: Path) -> None:
    write(tmp_path, torch.arange(1000.0), [500])
    file = tmp_path / "rank-00001.safetensors"
    good = file.read_bytes()
    assert storage.damage(tmp_path) is None

    file.write_bytes(good[:-7])
    assert f"{file}: has {len(good) - 7} bytes, was written with {len(good)}" == storage.damage(tmp_path)
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert f"{file}: its checksum isn't" in str(storage.damage(tmp_path))
    assert storage.damage(tmp_path, checksums=False) is None  # a glance doesn't see it
    file.unlink()
    assert f"{file}: No such file" in str(storage.damage(tmp_path))


def test_the_index_is_under_a_checksum_too(tmp_path: Path) -> None:
    write(tmp_path, torch.arange(10.0), [])
    index = tmp_path / storage.INDEX
    good = index.read_bytes()
    place = good.index(b'"note": 1') + len(b'"note": ')
    for changed in (good[:place] + b"2" + good[place + 1 :], good.replace(b'"sha256": "', b'"sha255": "')):
        index.write_bytes(changed)
        assert f"{index}: its checksum isn't" in str(storage.damage(tmp_path, checksums=False))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "isn't the index"),
        ("{", "isn't the index"),
        ("[]", "isn't the index"),
        ('{"format": 99}', "has format 99, this keel reads format 2"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / storage.INDEX).write_text(text)
    with pytest.raises(RunError, match=said):
        Reader(tmp_path)
    assert said in str(storage.damage(tmp_path))


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"checkpoint.json: No such file"):
        Reader(tmp_path)
    write(tmp_path, torch.arange(10.0), [4])
    with pytest.raises(RunError, match="holds no model/other"):
        Reader(tmp_path).read("model/other")
    index = json.loads((tmp_path / storage.INDEX).read_text())
    index["tensors"]["model/w"]["fragments"].pop(0)
    (tmp_path / storage.INDEX).write_text(storage.sealed(index))
    with pytest.raises(RunError, match="elements 0 to 10 of model/w are missing"):
        Reader(tmp_path).read("model/w", 0, 10)


class Trap:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, (str(self.trace), "w")  # type: ignore[return-value]


@pytest.mark.parametrize("target", ["rank-00000.safetensors", storage.INDEX])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_executed(tmp_path: Path, target: str) -> None:
    write(tmp_path / "c", torch.arange(10.0), [])
    file = tmp_path / "c" / target
    file.write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    if target != storage.INDEX:  # crafted with care: size and checksum fit
        index = json.loads((tmp_path / "c" / storage.INDEX).read_text())
        index["files"][0] |= {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        (tmp_path / "c" / storage.INDEX).write_text(storage.sealed(index))
        assert storage.damage(tmp_path / "c") is None
    with pytest.raises(RunError, match=target):
        storage.read_model(tmp_path / "c")
    assert not (tmp_path / "trace").exists()


def test_a_full_disk_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="rank-00000"):
        storage.write_fragments(tmp_path / "gone", 0, [Fragment("model/w", torch.zeros(3), 0, 3)])


def test_reading_needs_neither_deepspeed_nor_a_process_group(tmp_path: Path) -> None:
    write(tmp_path, torch.arange(6.0).view(2, 3), [2])
    script = (
        "import sys; from pathlib import Path; from pretrain.engines.storage import read_model;"
        "import torch.distributed as dist;"
        f"print(read_model(Path({str(tmp_path)!r}))['w'].tolist());"
        "assert not dist.is_initialized() and not {'deepspeed', 'accelerate', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]", done.stderr
