"""Does the demo learn? Trains it for several seeds and prints mean and spread of every figure.

    python benchmarks/learns.py [--seeds 0,1,2] [--nproc 2] [--dir runs/learns] [a.b=c ...]

The seed changes weights, order, crops and masks. The split of the digits and the labels that the probe
draws stay, so the spread is that of pretraining alone. Finished seeds are kept. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from configs.loading import load
from launch.demo import Findings, Row, judge, table
from launch.local import launch
from pretrain import trained
from pretrain.config import RunConfig
from pretrain.run import prepare


def one(seed: int, arguments: argparse.Namespace) -> tuple[Findings, float]:
    """Train and judge one seed; gives what was found, and the seconds of training (0 where it was kept)."""
    data = arguments.dir / "data" / "digits" / "train" / "manifest.json"
    own = [f"run.dir={arguments.dir}/seed-{seed}", f"run.seed={seed}", f"data.manifest={data}"]
    config = load(arguments.config, RunConfig, [*own, "track.wandb=off", "evaluate=[]", *arguments.overrides])
    folder = prepare(config, world_size=arguments.nproc)
    began = time.perf_counter()
    if folder.read_state().get("status") != "done":
        code = launch(folder, arguments.nproc)
        if code:
            sys.exit(code)
    seconds = time.perf_counter() - began
    return judge(trained.read(folder.root)), seconds


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path("runs/learns"))
    parser.add_argument("--config", default="demo/mae")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)

    results = []
    for seed in map(int, arguments.seeds.split(",")):
        findings, seconds = one(seed, arguments)
        results.append(findings)
        console.print(f"seed {seed}: {seconds:.0f} s")
        console.print(table(findings))
        print(json.dumps({"seed": seed, "seconds": round(seconds, 1), **asdict(findings)}), flush=True)
    for number, first in enumerate(results[0].rows):
        console.print(summary(first.features, [found.rows[number] for found in results]))
    for name in results[0].reconstruction:
        mean, spread = mean_and_spread([found.reconstruction[name] for found in results])
        console.print(f"error on hidden patches, {name}: {mean:.4f} ± {spread:.4f}")


def summary(name: str, rows: Sequence[Row]) -> str:
    """One line: mean ± spread over seeds of every column."""
    columns = {f"{shots} a class": [row.few_shot[shots] for row in rows] for shots in rows[0].few_shot}
    columns["kNN"] = [row.knn for row in rows]
    cells = ("{}: {:.1f} ± {:.1f}".format(title, *mean_and_spread(v)) for title, v in columns.items())
    return f"{name:18} " + "   ".join(cells)


if __name__ == "__main__":
    main()
