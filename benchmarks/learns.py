"""Do the demos learn? Trains one for several seeds: mean and spread of every figure, held to its gate.

    python benchmarks/learns.py [--config demo/moco] [--seeds 0,1,2] [--nproc 2] [--dir DIR] [a.b=c ...]

The seed changes weights, order, crops and masks. The data and the labels that the probe draws stay, so the
spread is that of pretraining alone. Finished seeds are kept. MAE is also fine-tuned on 10 labels a class,
against the same network from scratch. Prints a table and JSON; exits 1 where the gate is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from configs.loading import load
from launch.demo.demo import own_settings
from launch.demo.findings import Findings, Row, judge, labelled, table, validation
from launch.ranks.local import launch
from pretrain.clock import Duration
from pretrain.config import RunConfig
from pretrain.finetune import FineTuneConfig, Start, few_shot_accuracy
from pretrain.optimizers import OptimizerConfig
from pretrain.parts.augmentation import Augmentation
from pretrain.run import trained
from pretrain.run.main import prepare
from pretrain.run.trained import Trained

SHOTS = 10
"""Labels a class that MAE is fine-tuned on."""

FEW_LABELS = FineTuneConfig(
    duration=Duration(200, "steps"),
    batch_size=100,
    optimizer=OptimizerConfig(
        lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, warmup=Duration(20, "steps"), final_lr=1e-6
    ),
    layer_decay=0.75,
    augmentation=Augmentation(crop_scale=(0.5, 1.0), flip=0.0, rotation=15),
)
"""MAE's recipe for a hundred small digits, the same for both sides: no mirroring, crops not too small."""


@dataclass(frozen=True)
class Seed:
    """One seed's run."""

    findings: Findings
    seconds: float  # of training; 0 where a finished run was kept
    fine_tuned: Mapping[str, float]  # top-1 in percent after fine-tuning, by where it started


def one(seed: int, arguments: argparse.Namespace) -> Seed:
    """Train and judge one seed."""
    own = [
        *own_settings(arguments.config, arguments.dir),
        f"run.dir={arguments.dir}/{Path(arguments.config).stem}-seed-{seed}",
        f"run.seed={seed}",
        "track.wandb=off",
    ]
    config = load(arguments.config, RunConfig, [*own, *arguments.overrides])
    folder = prepare(config, world_size=arguments.nproc)
    began, seconds = time.perf_counter(), 0.0
    if folder.read_state().get("status") != "done":
        code = launch(folder, arguments.nproc, apart=True)
        if code:
            sys.exit(code)
        seconds = time.perf_counter() - began
    model = trained.read(folder.root)
    tuned = fine_tuned(model, seed) if config.objective.name == "mae" else {}
    return Seed(judge(model), seconds, tuned)


def fine_tuned(model: Trained, seed: int) -> dict[str, float]:
    """Accuracy on unseen images of the pretrained encoder and of its untrained twin, each fine-tuned alike.

    Layer decay spares what pretraining has learnt and holds back a network that has learnt nothing, so the
    twin is given a second try without it. Seed n is fine-tuned on draw n of the labels.
    """
    train = model.config.data.first_manifest
    fresh = trained.new_objective(model.config).encoder
    alike = FEW_LABELS.model_copy(update={"layer_decay": 1.0})
    found = {}
    for name, encoder, recipe in (
        ("pretrained", model.encoder, FEW_LABELS),
        ("from scratch", fresh, FEW_LABELS),
        ("from scratch, no layer decay", fresh, alike),
    ):
        start = Start(model.config.encoder, model.image_size, encoder.state_dict())
        found[name] = few_shot_accuracy(
            start, labelled(train), validation(train), recipe, shots=SHOTS, draw=seed, seed=seed
        )
    return found


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) if len(values) > 1 else 0.0


TWINS = ("from scratch", "from scratch, no layer decay")


def ahead(results: Sequence[Seed], twin: str) -> bool:
    """Whether fine-tuning gains more by pretraining than both spreads together."""
    tuned, spread = mean_and_spread([one.fine_tuned["pretrained"] for one in results])
    scratch, its_spread = mean_and_spread([one.fine_tuned[twin] for one in results])
    return tuned - scratch > spread + its_spread


def gates(config: str, results: Sequence[Seed]) -> dict[str, bool]:
    """What a demo promises, on means over the seeds, and whether it holds."""

    def mean(row: int, shots: int) -> float:
        return mean_and_spread([one.findings.rows[row].few_shot[shots] for one in results])[0]

    raw, untrained, pretrained = range(3)
    match Path(config).stem:
        case "clip":
            zero, _ = mean_and_spread([one.findings.rows[pretrained].zero_shot or 0.0 for one in results])
            return {
                "zero-shot at least 65": zero >= 65,
                "10 labels at least 55": mean(pretrained, 10) >= 55,
            }
        case "moco_shapes":
            return {
                "10 labels: twice raw pixels": mean(pretrained, 10) >= 2 * mean(raw, 10),
                "10 labels: twice the untrained encoder": mean(pretrained, 10) >= 2 * mean(untrained, 10),
            }
        case "moco":
            return {f"{n} labels: above raw pixels": mean(pretrained, n) > mean(raw, n) for n in (1, 5, 10)}
        case "mae":
            return {f"fine-tuning: ahead of {name}": ahead(results, name) for name in TWINS}
    return {}


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
        results.append(found := one(seed, arguments))
        console.print(f"seed {seed}: {found.seconds:.0f} s")
        console.print(table([found.findings]))
        print(json.dumps({"seed": seed, **asdict(found)}), flush=True)
    for number, first in enumerate(results[0].findings.rows):
        console.print(summary(first.features, [found.findings.rows[number] for found in results]))
    for title, parts in (
        ("error on hidden patches", [found.findings.reconstruction for found in results]),
        ("fine-tuned on 10 labels a class", [found.fine_tuned for found in results]),
    ):
        for name in parts[0]:
            mean, spread = mean_and_spread([part[name] for part in parts])
            console.print(f"{title}, {name}: {mean:.4g} ± {spread:.2g}")
    held = gates(arguments.config, results)
    for promise, holds in held.items():
        console.print(f"{'holds ' if holds else 'MISSED'}  {promise}")
    sys.exit(not all(held.values()))


def summary(name: str, rows: Sequence[Row]) -> str:
    """One line: mean ± spread over seeds of every column."""
    columns = {f"{shots} a class": [row.few_shot[shots] for row in rows] for shots in rows[0].few_shot}
    columns["kNN"] = [row.knn for row in rows]
    if rows[0].zero_shot is not None:
        columns["zero-shot"] = [row.zero_shot or 0.0 for row in rows]
    cells = ("{}: {:.1f} ± {:.1f}".format(title, *mean_and_spread(v)) for title, v in columns.items())
    return f"{name:18} " + "   ".join(cells)


if __name__ == "__main__":
    main()
