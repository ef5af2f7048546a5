"""A short bf16 MAE training of a ViT-B/16 through the real engine: throughput, MFU and peak memory.

    python benchmarks/gpu_check.py [--batch 256] [--steps 30] [--zero-stage 1]

Model and optimizer are those of configs/mae/vitb16_in1k_800ep.yaml. Batches are synthetic uint8 images in
pinned memory, copied to the device and normalised there each step: decoding is left out, all else is in.

MFU = FLOPs of a step / (seconds x peak). FLOPs are those of the model (Kaplan et al. 2020, arXiv:2001.08361
section 2.1, with attention): a layer of width d on n tokens takes 24 n d^2 + 4 n^2 d forward (a multiply-add
is two), training takes 3 x forward. Peaks are the makers' figures for dense bf16.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator

import torch

from configs.loading import load
from data_pipeline.augment import device_half
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.accumulation import accumulate_for
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.engines import deepspeed, processes
from pretrain.objective import BuildContext, Objective

CLAIM = "configs/mae/vitb16_in1k_800ep.yaml"
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "L40S": 362.0,
    "L4": 121.0, "A10": 125.0, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip
"""Dense bf16 with fp32 accumulation, from the makers' data sheets; the first name in the device's counts."""


def layer_flops(tokens: int, width: int) -> float:
    """Forward FLOPs of a transformer layer with MLP ratio 4 on one sequence."""
    return 24.0 * tokens * width**2 + 4.0 * tokens**2 * width


def mae_flops(
    patches: int, visible: int, patch_values: int, encoder: tuple[int, int], decoder: tuple[int, int]
) -> float:
    """Training FLOPs of one image; `encoder` and `decoder` are (width, depth); a class token is added."""
    width, depth = encoder
    decoder_width, decoder_depth = decoder
    forward = 2.0 * visible * patch_values * width  # patch embedding: of the visible patches
    forward += depth * layer_flops(visible + 1, width)
    forward += 2.0 * (visible + 1) * width * decoder_width
    forward += decoder_depth * layer_flops(patches + 1, decoder_width)
    forward += 2.0 * (patches + 1) * decoder_width * patch_values
    return 3.0 * forward


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU, None where it isn't listed."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def synthetic(batch_size: int, size: tuple[int, int], pinned: bool) -> Iterator[Batch]:
    """Two different batches of noise, again and again."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(2):
        views = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8, generator=generator)
        index = torch.arange(batch_size) + number * batch_size
        batches.append(Batch(views=(views.pin_memory() if pinned else views,), seeds=index, index=index))
    yield from itertools.cycle(batches)


def build(config: RunConfig, size: tuple[int, int], batch_size: int) -> Objective:
    """The claim's objective for images of `size`."""
    context = BuildContext(
        encoder=encoders.build(config.encoder, size), image_size=size, dataset_size=1_281_167,
        batch_size=batch_size, autocast=config.train.autocast,
    )  # fmt: skip
    return config.objective.build(context)


def measure(config: RunConfig, *, batch_size: int, steps: int, warm_up: int, device: str) -> dict[str, float]:
    """Train for `warm_up` + `steps` steps; gives samples/s, seconds a step, first and last loss."""
    size = (224, 224)
    here = processes.start(device)
    try:
        objective = build(config, size, batch_size)
        engine = deepspeed.initialize(
            objective, config.optimizer.make, here, micro_batch=batch_size,
            zero_stage=config.train.zero_stage, precision=config.train.precision,
        )  # fmt: skip
        total = warm_up + steps
        schedule = config.optimizer.schedule_for(4096, 1_281_167, 250_000)
        accumulate = accumulate_for(objective, batch_size, device_half(config.objective.views(size)))
        progress = Progress(
            10_000, 0, 250_000, 1_281_167
        )  # near the end of the warm-up, where the rate is real
        batches, losses = synthetic(batch_size, size, pinned=here.device.type == "cuda"), []
        for step, batch in zip(range(total), batches, strict=False):
            if step == warm_up:
                _wait(here.device)
                started = time.perf_counter()
            output = accumulate(engine, batch, progress)
            assert engine.step(schedule(progress)) is not None, "the gradient isn't finite"
            losses.append(output.loss)
        _wait(here.device)
        seconds = (time.perf_counter() - started) / steps
        engine.close()
    finally:
        processes.stop()
    return {
        "samples_per_second": batch_size / seconds, "seconds": seconds,
        "first_loss": float(losses[0]), "last_loss": float(losses[-1]),
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(measured: dict[str, float], device_name: str, batch_size: int, peak: float | None) -> str:
    """What a person wants to know, in lines."""
    flops = mae_flops(patches=196, visible=49, patch_values=768, encoder=(768, 12), decoder=(512, 8))
    rate = measured["samples_per_second"]
    achieved = flops * rate / 1e12
    share = (
        f"{achieved / peak:.1%} of {peak:g} TFLOP/s (dense bf16)" if peak else "unknown: give --peak-tflops"
    )
    lines = [
        f"device       {device_name}, torch {torch.__version__}",
        f"training     MAE ViT-B/16, bf16, batch {batch_size}, synthetic images",
        f"throughput   {rate:.0f} images/s, {1e3 * measured['seconds']:.1f} ms a step",
        f"FLOPs        {flops / 1e9:.1f} GFLOP an image (3 x forward), {achieved:.1f} TFLOP/s achieved",
        f"MFU          {share}",
        f"loss         {measured['first_loss']:.4f} at first, {measured['last_loss']:.4f} at last",
    ]
    if torch.cuda.is_available():
        lines.append(f"peak memory  {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measure and print; 0 also where there is no GPU, which is said."""
    parser = argparse.ArgumentParser(description="bf16 MAE ViT-B/16: throughput, MFU, peak memory")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--peak-tflops", type=float, help="of the device, where it isn't known")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try this script"
    )
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here: nothing measured")
        return 0
    config = load(CLAIM, RunConfig, [f"train.zero_stage={chosen.zero_stage}"])
    measured = measure(
        config, batch_size=chosen.batch, steps=chosen.steps, warm_up=chosen.warm_up, device=chosen.device
    )
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU"
    print(report(measured, name, chosen.batch, chosen.peak_tflops or peak_tflops(name)))
    return 0 if measured["last_loss"] < measured["first_loss"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
