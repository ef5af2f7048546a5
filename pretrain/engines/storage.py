"""A checkpoint folder: a safetensors file a rank and an index, readable without process group or DeepSpeed.

    rank-00000.safetensors   1-D fragments "<tensor>@<offset>": elements of the flattened tensor from there on
    checkpoint.json          where every fragment lies, whole shapes, sizes and checksums of files, state;
                             last its own checksum

Tensor names: "model/<name>" for parameters (the fp32 master) and buffers, "optimizer/<key>/<name>" for
moments, "rank/<rank>/<key>" for what one rank has to itself. Nothing is pickled: nothing in it can execute.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import RunError

INDEX = "checkpoint.json"
FORMAT = 2
_SEAL = ', "sha256": "'


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(data)) of a flattened tensor of `total` elements."""

    tensor: str
    data: Tensor  # (n,)
    start: int
    total: int


@dataclass(frozen=True)
class WrittenFile:
    """What a rank tells of the file it has written and flushed to disk."""

    name: str
    bytes: int
    sha256: str
    fragments: Sequence[tuple[str, int, int]]  # tensor, start, length


def write_fragments(directory: Path, rank: int, fragments: Iterable[Fragment]) -> WrittenFile:
    """Write this rank's file and flush it to disk. Raises OSError where the disk won't take it."""
    name = f"rank-{rank:05d}.safetensors"
    path = directory / name
    kept = [f for f in fragments if len(f.data)]
    tensors = {f"{f.tensor}@{f.start}": f.data.contiguous() for f in kept}
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk arrives so
        raise OSError(f"{path}: can't be written: {error}") from error
    size, digest = _flushed(path)
    return WrittenFile(name, size, digest, [(f.tensor, f.start, len(f.data)) for f in kept])


def write_index(
    directory: Path,
    files: Sequence[WrittenFile],
    shapes: Mapping[str, Sequence[int]],
    state: Mapping[str, Any],
) -> None:
    """Write checkpoint.json last of all: without it the folder isn't a checkpoint.

    `shapes`: whole shape by tensor name, flat where it isn't named. `state`: JSON values.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for number, file in enumerate(files):
        for tensor, start, length in file.fragments:
            entry = tensors.setdefault(tensor, {"shape": shapes.get(tensor), "fragments": []})
            entry["fragments"].append([start, length, number])
    for entry in tensors.values():
        entry["fragments"].sort()
    written = [{key: value for key, value in asdict(f).items() if key != "fragments"} for f in files]
    index = {"format": FORMAT, "files": written, "tensors": tensors, "state": dict(state)}
    beside = directory / f".{INDEX}"
    beside.write_text(sealed(index))
    _flushed(beside)
    beside.rename(directory / INDEX)
    flush_folder(directory)


def sealed(index: Mapping[str, Any]) -> str:
    """An index as it is written: JSON whose last entry is the SHA-256 of all that stands before it."""
    body = json.dumps({key: value for key, value in index.items() if key != "sha256"})[:-1]
    return f'{body}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}"}}'


def flush_folder(directory: Path) -> None:
    """Make renames and new names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Reader:
    """Reads any slice of any tensor of a checkpoint folder.

    Raises `RunError` naming the folder where it isn't a whole checkpoint of a known format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._index = _read_index(directory)
        self._open: dict[int, Any] = {}

    @property
    def state(self) -> dict[str, Any]:
        return dict(self._index["state"])

    @property
    def tensors(self) -> list[str]:
        return list(self._index["tensors"])

    def shape(self, tensor: str) -> list[int]:
        """The whole shape."""
        entry = self._index["tensors"][tensor]
        if entry["shape"] is not None:
            return list(entry["shape"])
        return [sum(length for _, length, _ in entry["fragments"])]

    def read(self, tensor: str, start: int = 0, length: int | None = None) -> Tensor:
        """(length,) elements of the flattened `tensor` from `start` on, on the CPU."""
        if tensor not in self._index["tensors"]:
            raise RunError(f"{self.directory}: holds no {tensor}; it was saved by another model or optimizer")
        fragments = self._index["tensors"][tensor]["fragments"]
        if length is None:
            length = sum(size for _, size, _ in fragments) - start
        parts, at, end = [], start, start + length
        for begin, size, file in fragments[max(0, bisect.bisect_right(fragments, [start, 2**62]) - 1) :]:
            if begin > at or at >= end:
                break
            if (until := min(end, begin + size)) > at:
                parts.append(self._file(file).get_slice(f"{tensor}@{begin}")[at - begin : until - begin])
                at = until
        if at < end:
            raise RunError(f"{self.directory}: elements {at} to {end} of {tensor} are missing; it is damaged")
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def whole(self, tensor: str) -> Tensor:
        """The whole tensor in its own shape, on the CPU."""
        return self.read(tensor).view(self.shape(tensor))

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self.directory / self._index["files"][number]["name"]
            try:
                self._open[number] = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
            except (OSError, SafetensorError) as error:
                raise RunError(f"{path}: can't be read: {error}") from error
        return self._open[number]


def read_model(directory: Path) -> dict[str, Tensor]:
    """Whole fp32 parameters and buffers by name, on the CPU: needs no process group and no engine."""
    reader = Reader(directory)
    return {
        name.removeprefix("model/"): reader.whole(name) for name in reader.tensors if name[:6] == "model/"
    }


def damage(directory: Path, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, None where every file has its size and checksum.

    Without `checksums` nothing but the index is read: a glance.
    """
    try:
        files = _read_index(directory)["files"]
    except RunError as error:
        return str(error)

    def problem(entry: Mapping[str, Any]) -> str | None:
        path = directory / entry["name"]
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path}: has {size} bytes, was written with {entry['bytes']}"
            if checksums and _digest(path) != entry["sha256"]:
                return f"{path}: its checksum isn't the one it was written with"
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None

    with ThreadPoolExecutor(max_workers=8) as readers:  # hashing and reading let go of the interpreter
        return next((found for found in readers.map(problem, files) if found), None)


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        content = path.read_bytes()
        index = json.loads(content)
        found = index["format"]
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; {directory.name} is no checkpoint") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: isn't the index of a checkpoint ({error})") from error
    if found != FORMAT:
        raise RunError(
            f"{path}: has format {found}, this keel reads format {FORMAT}; use the keel that wrote it"
        )
    body = content.rpartition(_SEAL.encode())[0]
    if index.get("sha256") != hashlib.sha256(body).hexdigest():
        raise RunError(f"{path}: its checksum isn't the one it was written with")
    assert isinstance(index, dict)
    return index


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flushed(path: Path) -> tuple[int, str]:
    """Flush a written file to disk; gives its size and checksum."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
