"""What must hold on a GPU as it does on the CPU: `make gpu-check`. KEEL_GPU_TESTS_ON=cpu tries the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.loading import load
from data_pipeline.augment import device_half
from data_pipeline.randomness import uniform
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.accumulation import SumOfMicroBatches
from pretrain.config import RunConfig
from pretrain.engines import deepspeed, processes
from pretrain.engines.processes import Processes
from pretrain.types import BuildContext, Objective, Progress, StepSettings

DEVICE = os.environ.get("KEEL_GPU_TESTS_ON", "cuda")
# The first step of DeepSpeed imports parts of torch that torch itself has deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
if DEVICE != "cpu":
    pytestmark.append(pytest.mark.gpu)

GROUP = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
SIZE = (32, 32)
START = Progress(step=0, samples=0, total_steps=20, dataset_size=1000)


def smoke() -> RunConfig:
    return load("configs/smoke/mae.yaml", RunConfig)


def objective(autocast: torch.dtype | None = None) -> Objective:
    config = smoke()
    torch.manual_seed(0)
    return config.objective.build(
        BuildContext(
            encoder=encoders.build(config.encoder, SIZE), image_size=SIZE, dataset_size=1000, batch_size=32,
            autocast=autocast,
        )
    )  # fmt: skip


def batch(count: int = 32) -> Batch:
    views = torch.randint(
        0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return Batch(views=(views,), seeds=torch.arange(count) * 7919, index=torch.arange(count))


def on(device: str, sample: Batch) -> Batch:
    return device_half(smoke().objective.views(SIZE))(sample.to(torch.device(device)))


@pytest.fixture(scope="module")
def here() -> Iterator[Processes]:
    """One process group for all: DeepSpeed remembers groups and takes no second one in a process."""
    before = dict(os.environ)
    yield processes.start(DEVICE)
    processes.stop()
    os.environ.clear()
    os.environ.update(before)


def test_the_numbers_of_a_sample_are_the_same_bits() -> None:
    seeds = torch.arange(-1000, 1000, dtype=torch.int64) * 104729
    assert uniform(seeds.to(DEVICE), 3, 77).cpu().equal(uniform(seeds, 3, 77))


def test_normalised_images_are_the_cpu_s() -> None:
    torch.testing.assert_close(
        on(DEVICE, batch()).views[0].cpu(), on("cpu", batch()).views[0], rtol=1e-6, atol=1e-6
    )


def test_fp32_loss_and_gradients_are_the_cpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the patch embedding
    found = {}
    for device in ("cpu", DEVICE):
        model = objective().to(device)
        loss = model(on(device, batch()), START).loss
        loss.backward()
        found[device] = (
            loss.detach().cpu(),
            {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None},
        )
    torch.testing.assert_close(found[DEVICE][0], found["cpu"][0], rtol=1e-5, atol=1e-6)
    for name, gradient in found["cpu"][1].items():
        torch.testing.assert_close(found[DEVICE][1][name], gradient, rtol=1e-3, atol=1e-5)


def train(here: Processes, stage: int, precision: str, steps: int, folder: Path | None = None) -> list[float]:
    """Losses of `steps` steps; saves to `folder` half-way, or goes on from it where it is filled."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    engine = deepspeed.initialize(
        objective(dtype), smoke().optimizer.make, here, micro_batch=16, accumulation=2, zero_stage=stage,
        gradient_clip=1.0, precision=precision,  # type: ignore[arg-type]  # one of the three by construction
    )  # fmt: skip
    accumulate = SumOfMicroBatches(16, device_half(smoke().objective.views(SIZE)))
    first, losses = 0, []
    if folder is not None and folder.exists():
        first = engine.load(folder)["step"]
    for step in range(first, steps):
        losses.append(float(accumulate(engine, batch(), START).loss))
        engine.step(StepSettings(lr=2e-3, weight_decay=0.05))
        if folder is not None and not folder.exists() and step + 1 == steps // 2:
            folder.mkdir()
            engine.save(folder, {"step": step + 1})
    engine.close()
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_trains_at_every_stage_near_fp32(here: Processes, stage: int) -> None:
    losses = train(here, stage, "bf16", 10)
    assert losses == pytest.approx(train(here, stage, "fp32", 10), rel=0.03)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.skipif(DEVICE == "cpu", reason="fp16 needs a GPU")
def test_fp16_trains_with_loss_scaling(here: Processes) -> None:
    losses = train(here, 1, "fp16", 20)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_saved_run_goes_on_bit_for_bit(
    here: Processes, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole = train(here, stage, "bf16", 8, tmp_path / "half")
    assert train(here, stage, "bf16", 8, tmp_path / "half") == whole[4:]


def test_keel_train_uses_the_gpu(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", "smoke/mae", f"run.dir={run}", "train.precision=bf16"]
    alone = {name: value for name, value in os.environ.items() if name not in GROUP}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[-1]["loss"] < rows[0]["loss"]
