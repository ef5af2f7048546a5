"""How long a save holds training up: a ViT-B/16 with AdamW's moments, one rank, against a synchronous save.

    python benchmarks/checkpoint_stall.py [--saves 5] [--dir FOLDER] [--zero-stage 1]

The synchronous time is the median of three saves that are waited for. Then, in a fresh process, a run makes
its first step and saves through the real `Checkpointer` as a run does, in the background; what each held up
the run is what the run's metric `checkpoint_stall` says. Saves follow each other as closely as they can
without waiting for a write: the next begins a millisecond after the one before was published, when the one
before that is still to be removed. Fails above 10 %, the first save included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.checkpoint import CheckpointConfig, Checkpointer
from pretrain.clock import Duration, Progress
from pretrain.encoders import EncoderConfig
from pretrain.engines import deepspeed, processes
from pretrain.objective import LossOutput, Objective, ParamGroup, trainable
from pretrain.optimizers import OptimizerConfig
from pretrain.ports import StepSettings

BOUND = 0.10


class Features(Objective):
    """The encoder alone: what is saved matters here, not what is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoders.build(EncoderConfig(name="vit_base_patch16_224"), (224, 224))

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        return LossOutput(self.encoder(batch.views[0]).square().mean(), {})

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(list(trainable(self)))]


def step(engine: deepspeed.DeepSpeedEngine, progress: Progress) -> Progress:
    """One of two images; its time doesn't matter."""
    batch = Batch((torch.randn(2, 3, 224, 224),), torch.arange(2), torch.arange(2))
    engine.backward(engine.forward(batch, progress).loss)
    assert engine.step(StepSettings(lr=1e-4, weight_decay=0.05)) is not None
    return progress.consumed(2).applied()


def measure(folder: Path, saves: int, stage: int, waited: bool) -> dict[str, list[float]]:
    """Seconds each save held the run up, and each write took; `waited`: nothing is done meanwhile."""
    here = processes.start("cpu")
    told: dict[str, list[float]] = {"checkpoint_stall": [], "checkpoint_write": []}
    try:
        engine = deepspeed.initialize(
            Features(), OptimizerConfig(lr=1e-4).make, here, micro_batch=2, zero_stage=stage,
            expects_saves=True,
        )  # fmt: skip
        progress = Progress(0, 0, 1000, 1000)
        checkpointer = Checkpointer(
            CheckpointConfig(keep=1, every=Duration(1000, "steps")), folder, engine,
            attempt=1, start=progress, batch_size=2,
            extra=lambda progress: {"step": progress.step},
            tell=lambda progress, values: [told[name].append(value) for name, value in values.items()],
        )  # fmt: skip
        before = None
        for _ in range(saves):
            progress = step(engine, step(engine, progress))
            while before is not None and not before.exists():
                time.sleep(0.001)
            started = time.perf_counter()
            checkpointer.save(progress)
            if waited:
                checkpointer.wait()
                told["checkpoint_stall"][-1] = time.perf_counter() - started
            before = folder / "checkpoints" / f"step-{progress.step:08d}-a01"
        checkpointer.settle()
        engine.close()
    finally:
        processes.stop()
    return told


def in_a_process(folder: str, saves: int, stage: int, waited: bool) -> list[float]:
    with tempfile.TemporaryDirectory(dir=folder) as run:
        arguments = ["--dir", run, "--saves", str(saves), "--zero-stage", str(stage)]
        command = [sys.executable, __file__, *arguments, "--only", "waited" if waited else "stalls"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return [float(second) for second in found["checkpoint_stall"]]


def main(arguments: list[str]) -> int:
    """Measure and print; 1 where a stall is above the bound."""
    parser = argparse.ArgumentParser(description="how long a save holds training up")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--dir", default=None, help="a folder on the disk to measure")
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--only", choices=["waited", "stalls"], help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.only:
        found = measure(Path(chosen.dir), chosen.saves, chosen.zero_stage, chosen.only == "waited")
        print(json.dumps(found))
        return 0
    waited = in_a_process(chosen.dir, 3, chosen.zero_stage, waited=True)
    stalls = in_a_process(chosen.dir, chosen.saves, chosen.zero_stage, waited=False)
    whole = statistics.median(waited)
    print(f"ViT-B/16 with AdamW (86 M parameters, 1.03 GB), one rank, ZeRO stage {chosen.zero_stage}")
    print(f"synchronous save: {', '.join(f'{s:.2f}' for s in waited)} s; median {whole:.2f} s")
    for number, stall in enumerate(stalls, start=1):
        print(f"stall of save {number}: {stall:.3f} s, {stall / whole:.1%}")
    held = max(stalls) <= BOUND * whole
    print(f"bound {BOUND:.0%}: {'held' if held else 'NOT held'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
