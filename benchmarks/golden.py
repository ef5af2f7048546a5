"""Does this tree compute what another commit did? 12 steps of every smoke config, to the last bit.

    python benchmarks/golden.py PARENT                  every cut of every objective: some ten minutes
    python benchmarks/golden.py PARENT --only mae clip  these objectives
    python benchmarks/golden.py PARENT --mutate         must fail: this tree learns 1.0001 times as fast

Both trees run here and now, one after the other for each cut, because other machines and other builds of
torch round otherwise. Compared is all that training computes: the loss, the gradient's norm, the rates and
the objective's own figures. What differs is listed with both values; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
CUTS = ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3))
"""Ranks and ZeRO stage."""

STEPS = 12
FIXED = (
    f"train.duration={STEPS} steps", "optimizer.warmup=2 steps", "track.every=1 steps", "track.wandb=off",
    "evaluate=[]",
)  # fmt: skip
MUTATION = 1.0001
COMPUTED = ("step", "samples", "loss", "lr", "weight_decay", "grad_norm")
"""Columns that are computed, beside an objective's own; others tell how long something took."""


def rows(tree: Path, config: str, ranks: int, stage: int, folder: Path, *more: str) -> list[dict[str, float]]:
    """What a tree's own `keel train` writes down of a config, step by step."""
    command = [
        sys.executable, "-m", "launch", "train", str(tree / f"configs/smoke/{config}.yaml"), *FIXED, *more,
        f"run.dir={folder}", f"train.zero_stage={stage}", "--nproc", str(ranks),
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{config}, {ranks} ranks, stage {stage} in {tree}:\n{done.stderr}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differences(
    before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]
) -> Iterator[tuple[int, str, float | None, float | None]]:
    """Step, column and both values, for every figure that isn't the same to the bit."""
    assert len(before) == len(after) == STEPS, (len(before), len(after))
    for step, (old, new) in enumerate(zip(before, after, strict=True), 1):
        for name in sorted({*old, *new}):
            if (name in COMPUTED or name.startswith("objective/")) and old.get(name) != new.get(name):
                yield step, name, old.get(name), new.get(name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parent", help="the commit to compare with")
    parser.add_argument("--only", nargs="*", default=[], help="objectives")
    parser.add_argument("--mutate", action="store_true", help="this tree learns 1.0001 times as fast")
    asked = parser.parse_args()
    configs = sorted(path.stem for path in (ROOT / "configs/smoke").glob("*.yaml"))
    changed = 0
    with tempfile.TemporaryDirectory() as scratch:
        parent, folder = Path(scratch) / "parent", Path(scratch) / "runs"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", parent, asked.parent], cwd=ROOT, check=True
        )
        try:
            for config in [name for name in configs if not asked.only or name in asked.only]:
                if not (parent / f"configs/smoke/{config}.yaml").is_file():
                    print(f"{config}: isn't in {asked.parent}")
                    continue
                for ranks, stage in CUTS:
                    place = f"{config}-{ranks}-{stage}"
                    before = rows(parent, config, ranks, stage, folder / f"{place}-before")
                    rate = yaml.safe_load((folder / f"{place}-before/config.yaml").read_text())["optimizer"][
                        "lr"
                    ]
                    more = [f"optimizer.lr={float(rate) * MUTATION!r}"] if asked.mutate else []
                    after = rows(ROOT, config, ranks, stage, folder / f"{place}-after", *more)
                    unequal = list(differences(before, after))
                    changed += bool(unequal)
                    print(
                        f"{place}: {'equal to the bit' if not unequal else f'{len(unequal)} figures differ'}"
                    )
                    for step, name, old, new in unequal[:3]:
                        print(f"    step {step}: {name}: {old!r} -> {new!r}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", parent], cwd=ROOT, check=True)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
