"""Is the loader's memory flat? Resident size of the workers over a million samples.

    python benchmarks/loader_memory.py [--samples N]

Small pictures in many small shards, so that shards are opened and dropped as often as in a very large set.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg

from data_pipeline.config import DataConfig
from data_pipeline.indexing import add_shard
from data_pipeline.load import build_loader
from data_pipeline.manifest import Manifest
from data_pipeline.shards import write_shard
from data_pipeline.types import RandomResizedCrop, ViewSpec

SHARDS, PER_SHARD, BATCH = 600, 50, 512
ALLOWED = 8.0  # MB of growth between a tenth of the way and the end


def make_data(folder: Path) -> None:
    """600 shards of 50 tiny JPEGs: three times as many as are kept open."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(SHARDS):
        images = rng.integers(0, 256, (PER_SHARD, 16, 16, 3), dtype=np.uint8)
        path = folder / f"shard-{number:06d}.tar"
        rows = [
            (f"{number}-{row}", {"jpg": simplejpeg.encode_jpeg(image)}) for row, image in enumerate(images)
        ]
        write_shard(path, rows)
        made.append(add_shard(folder, path, path.name))
    Manifest(folder, tuple(one.shard for one in made), ("jpg",)).save()


def resident(pid: int) -> float:
    """Private resident megabytes of a process: what it shares with its parent doesn't count."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def main() -> int:
    """Print the sizes; exit code 1 where a worker has grown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1_000_000)
    samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        config = DataConfig(manifest=Path(folder), workers=2, window=64)
        views = [ViewSpec((16, 16), RandomResizedCrop())]
        sizes: list[list[float]] = []
        with build_loader(
            config, views, needs=frozenset({"views"}), seed=0, batch_size=BATCH, rank=0, world_size=1,
            position=0,
        ) as loader:  # fmt: skip
            for tenth in range(1, 11):
                while loader.position < samples * tenth // 10:
                    next(loader)
                sizes.append([resident(pid) for pid in loader.worker_pids()])
                print(f"{loader.position:>10} samples: " + ", ".join(f"{size:.1f} MB" for size in sizes[-1]))
    growth = max(last - first for first, last in zip(sizes[0], sizes[-1], strict=True))
    print(f"growth of the worst worker from a tenth on: {growth:.1f} MB, allowed {ALLOWED:g}")
    return int(growth > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
