"""What must hold on a GPU as it does on the CPU: `make gpu-check`. KEEL_GPU_TESTS_ON=cpu tries the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.loading import load
from data_pipeline.augment import device_half
from data_pipeline.randomness import uniform
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.accumulation import accumulate_for
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.engines import deepspeed, processes
from pretrain.engines.processes import Processes
from pretrain.objective import BuildContext, Objective, WholeBatchObjective
from pretrain.ports import StepSettings

DEVICE = os.environ.get("KEEL_GPU_TESTS_ON", "cuda")
# The first step of DeepSpeed imports parts of torch that torch itself has deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
if DEVICE != "cpu":
    pytestmark.append(pytest.mark.gpu)

GROUP = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
SIZE = (32, 32)
EVERY = ("mae", "moco", "clip", "siglip", "moco_v3")
START = Progress(step=0, samples=0, total_steps=20, dataset_size=1000)


def smoke(name: str = "mae") -> RunConfig:
    return load(f"configs/smoke/{name}.yaml", RunConfig)


def objective(name: str = "mae", autocast: torch.dtype | None = None, accumulation: int = 1) -> Objective:
    config = smoke(name)
    torch.manual_seed(0)
    return config.objective.build(
        BuildContext(
            encoder=encoders.build(config.encoder, SIZE), image_size=SIZE, dataset_size=1000, batch_size=32,
            autocast=autocast, accumulation=accumulation,
        )
    )  # fmt: skip


def batch(name: str = "mae", count: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = tuple(
        torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=generator)
        for _ in smoke(name).objective.views(SIZE)
    )
    tokens = torch.randint(1, 300, (count, 9), generator=generator)  # each text's end is its largest
    return Batch(views, torch.arange(count) * 7919, torch.arange(count), tokens=tokens)


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


def train(
    here: Processes,
    name: str,
    stage: int,
    precision: str,
    steps: int,
    folder: Path | None = None,
    **options: Any,
) -> list[float]:
    """Losses of `steps` steps; saves to `folder` half-way, or goes on from it where it is filled."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    built = objective(name, dtype, accumulation=2)
    engine = deepspeed.initialize(
        built, smoke(name).optimizer.make, here, micro_batch=16, zero_stage=stage, gradient_clip=1.0,
        accumulation=1 if isinstance(built, WholeBatchObjective) else 2,
        precision=precision, **options,  # type: ignore[arg-type]  # one of the three by construction
    )  # fmt: skip
    accumulate = accumulate_for(built, 16, device_half(smoke(name).objective.views(SIZE)))
    first, losses = 0, []
    if folder is not None and folder.exists():
        first = engine.load(folder)["step"]
    for step in range(first, steps):
        output = accumulate(engine, batch(name), START)
        losses.append(float(output.loss))
        update = engine.step(StepSettings(lr=1e-3, weight_decay=0.05))
        if update is not None:
            built.after_step(update, START, output)
        if folder is not None and not folder.exists() and step + 1 == steps // 2:
            folder.mkdir()
            engine.save(folder, {"step": step + 1})
    engine.close()
    return losses


@pytest.mark.parametrize(("name", "stage"), [("mae", s) for s in range(4)] + [(n, 1) for n in EVERY[1:]])
def test_bf16_trains_near_fp32(here: Processes, name: str, stage: int) -> None:
    losses = train(here, name, stage, "bf16", 8)
    assert losses == pytest.approx(train(here, name, stage, "fp32", 8), rel=0.1)


@pytest.mark.skipif(DEVICE == "cpu", reason="fp16 needs a GPU")
@pytest.mark.parametrize("name", EVERY)
def test_fp16_trains_with_loss_scaling(here: Processes, name: str) -> None:
    losses = train(here, name, 1, "fp16", 20)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses == pytest.approx(train(here, name, 1, "fp32", 20), rel=0.1)


@pytest.mark.parametrize("stage", range(4))
def test_an_overflow_of_scaled_gradients_is_skipped(here: Processes, stage: int) -> None:
    built = objective()
    engine = deepspeed.initialize(
        built, smoke().optimizer.make, here, micro_batch=32, zero_stage=stage, precision="fp16"
    )
    assert engine.loss_scale is not None
    accumulate = accumulate_for(built, 32, device_half(smoke().objective.views(SIZE)))
    found = []
    for scale in (2.0**16, 2.0**127, 2.0**16):  # the second is infinite in fp32 once multiplied
        engine.loss_scale.value = scale
        accumulate(engine, batch(), START)
        found.append(engine.step(StepSettings(lr=1e-3, weight_decay=0.05)) is not None)
        if scale > 2.0**16:
            assert engine.loss_scale.value == scale / 2
    assert found == [True, False, True]
    engine.close()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpointing_trains_the_same(here: Processes, name: str, stage: int) -> None:
    plain = train(here, name, stage, "bf16", 4)
    lean = train(here, name, stage, "bf16", 4, activation_checkpointing=True)
    assert lean == pytest.approx(plain, rel=1e-2)


# Dynamo looks at .grad of what isn't a leaf and hides torch's warning, which an error filter sees before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", EVERY)
def test_compiled_blocks_train_the_same(here: Processes, name: str) -> None:
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"
    plain = train(here, name, 1, "bf16", 4)
    compiled = train(here, name, 1, "bf16", 4, compile_backend=backend, activation_checkpointing=True)
    assert compiled == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_trains_the_same(here: Processes, stage: int) -> None:
    plain = train(here, "mae", stage, "bf16", 4)
    assert train(here, "mae", stage, "bf16", 4, offload_optimizer=True) == pytest.approx(plain, rel=1e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="only GPUs have TF32")
@pytest.mark.parametrize("name", EVERY)
def test_tf32_is_as_configured_and_near_fp32(here: Processes, name: str) -> None:
    quick = train(here, name, 1, "fp32", 4, tf32=True)
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    exact = train(here, name, 1, "fp32", 4)
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert quick == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize(("name", "stage"), [("mae", 1), ("mae", 3), ("moco", 1), ("clip", 1)])
def test_a_saved_run_goes_on_bit_for_bit(
    here: Processes, name: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole = train(here, name, stage, "bf16", 8, tmp_path / "half")
    assert train(here, name, stage, "bf16", 8, tmp_path / "half") == whole[4:]


def test_keel_train_uses_the_gpu(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "train", "smoke/mae", f"run.dir={run}", "train.precision=bf16"]
    alone = {name: value for name, value in os.environ.items() if name not in GROUP}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[-1]["loss"] < rows[0]["loss"]
