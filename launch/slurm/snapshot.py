"""The code of a submission: jobs run what was submitted, not the tree as it is when they start."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from configs.errors import RunError

PACKAGES = ("configs", "data_pipeline", "pretrain", "launch")
COPIED = (".py", ".yaml", ".html", ".css", ".js", ".txt")
"""Endings of what keel's packages consist of."""


def take(into: Path) -> Path:
    """Copy keel as it is imported here to `into/<hash of its content>`, once; gives that folder.

    Beside the packages lie `commit.txt`, `diff.patch` (what differs from that commit) and `packages.txt`.
    Raises `RunError` where it can't be written.
    """
    files = _files()
    folder = into / _digest(files)
    if folder.is_dir():
        return folder
    # Another host, or a container, may have a process of the same number.
    beside = into / f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for name, path in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, beside / name)
        for name, text in _record().items():
            (beside / name).write_text(text)
        beside.rename(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        if folder.is_dir():  # another submission of the same code was quicker
            return folder
        raise RunError(f"{into}: the code can't be copied here: {error.strerror}") from error
    return folder


def place(into: Path) -> Path:
    """What `take` would give; writes nothing."""
    return into / _digest(_files())


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _files() -> dict[str, Path]:
    """Name in the snapshot to file, in order of name."""
    found: dict[str, Path] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        assert module.__file__ is not None
        root = Path(module.__file__).parent
        found |= {
            str(Path(package) / path.relative_to(root)): path
            for path in root.rglob("*")
            if path.suffix in COPIED and path.is_file() and "__pycache__" not in path.parts
        }
    return dict(sorted(found.items()))


def _record() -> dict[str, str]:
    versions = {d.metadata["Name"]: d.version for d in distributions()}
    return {
        "commit.txt": _git("rev-parse", "HEAD"),
        "diff.patch": _git("diff", "HEAD", "--binary"),
        "packages.txt": "".join(f"{name}=={versions[name]}\n" for name in sorted(versions, key=str.lower)),
    }


def _git(*arguments: str) -> str:
    """What git says of the tree that keel lies in, empty where it is none."""
    try:
        found = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout


def describe(folder: Path) -> str:
    """One line: the commit a snapshot was taken from, and whether the tree differed from it."""
    commit = (folder / "commit.txt").read_text().strip()
    dirty = " with changes (diff.patch)" if (folder / "diff.patch").stat().st_size else ""
    return json.dumps(str(folder)) + (f": commit {commit[:12]}{dirty}" if commit else "")
