"""README's lines and those of docs/, typed by a newcomer: each in a fresh shell, outside of the checkout.

The lines are taken from the pages, so that a page can't promise what isn't tried. What is changed is written
down here: sizes (a training of 800 epochs takes 2 steps of a small network), names of data sets and runs that
nobody has, and what a network or a cluster is needed for. A line that isn't known here fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

ELSEWHERE = {
    "make demo": "takes minutes; tests/launch/demo/test_demo.py runs a small one",
    "make test": "runs this",
    "gpu.yaml": "needs a cluster; tests/slurm has one",
    "/shared/runs": "of a cluster",
    "<member>": "of a sweep on a cluster",
    "--metric knn/top1": "of a sweep on a cluster",
    "keel resume": "of a sweep on a cluster",
    "keel sync": "needs W&B's server; tests/launch/cli/test_sync.py has one",
    "keel data bench": "measures for half a minute",
    "s3://": "of a cloud; tests/data_pipeline/test_s3.py has a server",
}
"""Parts of lines that aren't run here, and why."""

SMALL = {
    "keel train": (
        "train.duration='2 steps' train.batch_size=4 optimizer.warmup='1 steps' data.workers=0 "
        "track.wandb=off evaluate='[{kind: knn, data: data/labelled}]' "
        "encoder.args='{patch_size: 56, embed_dim: 48, depth: 2, num_heads: 2}' "
        "objective.decoder_width=32 objective.decoder_depth=1 objective.decoder_heads=2"
    ),
    "keel finetune": (
        "duration='2 steps' batch_size=4 optimizer.warmup='1 steps' mixup=0 cutmix=0 --workers 0"
    ),
}
"""What is added to a line, so that it takes seconds."""

STANDS_FOR = {
    "--nproc 8": "--nproc 2",
    " --config finetune/vitb16_in1k": "",  # the default
    "classifiers/mae": "classifiers/photos",
    "vit_base_patch16_224.mae": "backbones/photos",  # needs a network
    " ...": " data.manifest=data/photos/manifest.json",
    "/data/imagenet": "data/labelled",
    "runs/mae-lr2": "runs/photos-2",
    "runs/mae": "runs/photos",
    "runs/sweep-mae-lr --sort=-best": "runs --sort=-loss",
    "report runs/sweep": "report runs",
    "shards/{000000..000123}.tar": "data/labelled/train/shard-{000000..000000}.tar",
    "pairs.csv": "tabled/pairs.csv",
    "backbones/mae": "backbones/photos",
    "MANIFEST": "data/captioned/manifest.json",
    "SHARDS...": "data/photos/*.tar",
    "SOURCE": "photos",
    " DIR": " again",
    " CONFIG": " data/photos/manifest.json",
    " FILE": " tokenizer.json",
    " RUN": " runs/photos",
}
"""Names on the pages, and what is there of them."""


def lines(page: Path) -> list[str]:
    """Commands in the fenced blocks of a page, without the words that explain them."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if re.match(r"\$ |(keel|make) ", line):
                found.append(re.split(r"\s+#\s|\s{3,}", line.removeprefix("$ "))[0].strip())
    return found


def placed(line: str) -> str:
    """The line with names of what is there."""
    for name, place in STANDS_FOR.items():
        line = line.replace(name, place)
    return line


def cases() -> Iterator[Any]:
    """README's lines first; lines that come to the same run once."""
    seen = set[str]()
    for page in PAGES:
        for line in lines(page):
            if placed(line) not in seen and not any(part in line for part in ELSEWHERE):
                seen.add(placed(line))
                yield pytest.param(placed(line), id=f"{page.stem}: {line}")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs, where somebody has just made `.venv`."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / ".venv").symlink_to(sys.prefix)
    (desk / "configs").symlink_to(ROOT / "configs")
    pixels = np.random.default_rng(0)
    table = ["path,caption"]
    for number in range(24):
        photo = desk / "photos" / ("cats", "dogs")[number % 2] / f"{number}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(photo)
        table.append(f"{photo.relative_to(desk / 'photos')},number {number} of a heap")
    (desk / "photos.csv").write_text("\n".join(table))
    (desk / "classes.txt").write_text("cats\ndogs\n")
    for line in (
        "keel data pack photos --out data/labelled/train && cp -r data/labelled/train data/labelled/val",
        "cp -r photos tabled && mv photos.csv tabled; keel data pack tabled/photos.csv --out data/captioned",
    ):
        said = typed(desk, line)
        assert said.returncode == 0, said.stderr
    table[0] = "path,alt_text"
    (desk / "tabled" / "pairs.csv").write_text("\n".join(table))
    return desk


def typed(desk: Path, line: str) -> subprocess.CompletedProcess[str]:
    """What a shell says to `line`, in the folder `desk`, with nothing but PATH and HOME to begin with."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(desk),
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
    }
    if line.startswith("keel") and "PYTHONPATH" in os.environ:  # whose keel it is, where it isn't .venv's
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return subprocess.run(
        ["bash", "-c", f". .venv/bin/activate && {line}"],
        cwd=desk, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_the_pages_have_lines() -> None:
    assert len(lines(ROOT / "README.md")) > 10
    known = "\n".join(line for page in PAGES for line in lines(page))
    assert not [part for part in (*ELSEWHERE, *SMALL) if part not in known and part != "keel data bench"]


@pytest.mark.parametrize("line", list(cases()))
def test_a_line_of_a_page_works(desk: Path, line: str) -> None:
    """In their order: README's first, whose run and export the others look at."""
    if "runs/photos-2" in line and not (desk / "runs/photos-2").exists():
        shutil.copytree(desk / "runs/photos", desk / "runs/photos-2")
    words = line.split()[:2]
    said = typed(desk, f"{line} {SMALL.get(' '.join(words), '')}")
    assert said.returncode == 0, f"{line}\n{said.stdout}\n{said.stderr}"
    made = re.search(r" (?:--out|-o|--to) (\S+)", line)
    assert made is None or (desk / made[1]).exists()
