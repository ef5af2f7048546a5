"""What counting every tar anew costs `keel data verify`, against indexing it anew, as it did before.

    python benchmarks/verify_cost.py [--samples N] [--side PIXELS] [--pairs N]

A synthetic set of small members, where headers weigh most; both ways are timed in turn, CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg

from data_pipeline import verify as module
from data_pipeline.books import Books
from data_pipeline.index import survey
from data_pipeline.indexing import index
from data_pipeline.manifest import Manifest
from data_pipeline.shards import write_shard

SHARDS = 3
ALLOWED = 1.3  # times as long as before


def make_set(folder: Path, samples: int, side: int) -> Manifest:
    """Shards of JPEGs with captions and labels: three members a sample."""
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        rows = [
            (
                f"{number:03d}{row:06d}",
                {
                    "jpg": simplejpeg.encode_jpeg(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)),
                    "txt": b"a picture",
                    "cls": b"1",
                },
            )
            for row in range(samples // SHARDS)
        ]
        write_shard(folder / f"{number}.tar", rows)
    return index([str(folder)], folder / "list")


def indexed_anew(manifest: Manifest, number: int, path: Path) -> None:
    """How a shard was checked before: its index made anew and compared."""
    found = survey(path)
    assert found.sha256 == manifest.shards[number].sha256
    assert found.index.to_bytes() == manifest.index(number).to_bytes()


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--side", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--pairs", type=int, default=7)
    wanted = parser.parse_args()
    whole, members = module._check_whole, module._check_members
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_set(Path(folder), wanted.samples, wanted.side)
        for pictures in (False, True):
            times: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(wanted.pairs):
                for before in (True, False):
                    module._check_whole = indexed_anew if before else whole
                    module._check_members = (lambda *_: Books("members")) if before else members
                    times[before].append(seconds(partial(module.verify, manifest, pictures=pictures)))
            old, new = (statistics.median(times[before]) for before in (True, False))
            print(
                f"{wanted.samples} samples, {'pictures decoded' if pictures else '--fast'}: {old:.3f} CPU s "
                f"before, {new:.3f} now: {new / old:.2f}x (at most {ALLOWED})"
            )


if __name__ == "__main__":
    main()
