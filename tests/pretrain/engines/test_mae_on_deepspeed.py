"""MAE on the engine: losses over ranks, accumulation, stages and precision, and its resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.encoders import EncoderConfig
from pretrain.engines import processes, storage
from pretrain.engines.deepspeed import DeepSpeedEngine, initialize
from pretrain.objective import BuildContext
from pretrain.objectives.mae import MAEConfig
from pretrain.optimizers import OptimizerConfig
from pretrain.ports import StepSettings
from tests.conftest import Ranks

BATCH_SIZE, STEPS = 8, 4


def build(
    stage: int, accumulation: int, autocast: torch.dtype | None
) -> tuple[DeepSpeedEngine, processes.Processes]:
    here = processes.start("cpu")
    processes.seed(0)
    shape = {
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 2,
        "num_heads": 4,
    }  # its products exceed ZeRO-3's 1e5
    encoder = encoders.build(EncoderConfig(name="vit_tiny_patch16_224", args=shape), (32, 32))
    context = BuildContext(encoder, (32, 32), dataset_size=100, batch_size=BATCH_SIZE, autocast=autocast)
    objective = MAEConfig.model_validate({"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 4}).build(
        context
    )
    make = OptimizerConfig(lr=1e-3).make
    micro = BATCH_SIZE // here.world_size // accumulation
    options = {"micro_batch": micro, "accumulation": accumulation, "zero_stage": stage, "gradient_clip": 1.0}
    return initialize(objective, make, here, **options), here  # type: ignore[arg-type]


def steps(
    engine: DeepSpeedEngine, here: processes.Processes, start: int, end: int, accumulation: int
) -> list[float]:
    losses = []
    for step in range(start, end):
        generator = torch.Generator().manual_seed(step)
        seeds = torch.randint(0, 2**62, (BATCH_SIZE,), generator=generator)
        images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator)
        batch = Batch((images,), seeds, torch.arange(BATCH_SIZE))
        share = list(batch.split(BATCH_SIZE // here.world_size))[here.rank]
        total = torch.zeros(())
        for micro in share.split(len(share) // accumulation):
            output = engine.forward(micro, Progress(step, step * BATCH_SIZE, 10, 100))
            engine.backward(output.loss)
            total += output.loss.detach() / accumulation / here.world_size
        assert engine.step(StepSettings(lr=1e-3, weight_decay=0.05)) is not None
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    return losses


def run(stage: int, accumulation: int = 1, half: bool = False, directory: Path | None = None) -> list[float]:
    engine, here = build(stage, accumulation, torch.bfloat16 if half else None)
    losses = steps(engine, here, 0, STEPS, accumulation)
    if directory is not None:
        engine.save(directory, {})
        losses = steps(engine, here, STEPS, STEPS + 2, accumulation)
    engine.close()
    processes.stop()
    return losses


def resume(stage: int, directory: Path) -> list[float]:
    engine, here = build(stage, 1, None)
    engine.load(directory)
    losses = steps(engine, here, STEPS, STEPS + 2, 1)
    engine.close()
    processes.stop()
    return losses


@pytest.mark.parametrize(
    ("count", "stage", "accumulation", "half"),
    [(1, 0, 2, False), (2, 0, 1, False), (2, 1, 2, False), (4, 1, 1, False),
     (2, 2, 2, False), (2, 3, 1, False), (2, 1, 1, True), (2, 3, 2, True)],
)  # fmt: skip
def test_losses_are_one_ranks(ranks: Ranks, count: int, stage: int, accumulation: int, half: bool) -> None:
    alone = ranks(1, run, stage=0, half=half)[0]
    assert alone[-1] < alone[0]
    for losses in ranks(count, run, stage=stage, accumulation=accumulation, half=half):
        assert losses == pytest.approx(alone, rel=3e-3 if half else 1e-5)


def test_resumes_exactly_and_exports_the_encoder(ranks: Ranks, tmp_path: Path) -> None:
    straight = ranks(2, run, stage=1, directory=tmp_path / "c")
    assert ranks(2, resume, stage=1, directory=tmp_path / "c") == straight
    names = {name for name in storage.read_model(tmp_path / "c") if name.startswith("encoder.")}
    assert "encoder.blocks.1.mlp.fc2.weight" in names and "encoder.pos_embed" in names
