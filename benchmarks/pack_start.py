"""How soon `keel data pack` has written something, against `keel data index` of the same pictures.

    python benchmarks/pack_start.py [--pictures 200] [--rounds 5]

Both are started as a user starts them, in turn. Printed are the medians of the seconds from the start of the
process to the first bytes of a shard (pack), and to the first sidecar (index), and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def first_bytes(words: Sequence[str | Path], below: Path, pattern: str) -> float:
    """Seconds until a file of `pattern` below `below` has content."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "launch", "data", *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as process:
        while not any(_size(path) for path in below.rglob(pattern)):
            if process.poll() not in (None, 0):
                raise SystemExit(f"{words}: exit code {process.returncode}")
            time.sleep(0.002)
        return time.perf_counter() - start


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "in").mkdir()
        rng = np.random.default_rng(0)
        for number in range(options.pictures):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)
            picture.save(place / "in" / f"{number:05d}.jpg", quality=90)
        seconds: dict[str, list[float]] = {"pack": [], "index": []}
        for number in range(options.rounds + 1):
            packed, listed = place / f"pack{number}", place / f"index{number}"
            packed.mkdir()
            listed.mkdir()
            words = ("pack", place / "in", "--out", packed / "out")
            pack = first_bytes(words, packed, "*shard-000000.tar*")
            shard = packed / "out" / "shard-000000.tar"
            index = first_bytes(("index", shard, "--out", listed / "out"), listed, "*.idx")
            if number:  # the first round fills the page cache
                seconds["pack"].append(pack)
                seconds["index"].append(index)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:6} {value:.2f} s")
    print(f"ratio  {medians['pack'] / medians['index']:.2f}")


if __name__ == "__main__":
    main()
