"""Contrastive losses in tiles against the plain ones: peak extra memory and time, forward and backward.

    python benchmarks/contrastive_memory.py [--batch 16384] [--width 512] [--threads 2]

Each loss runs in a process of its own. Extra memory is the highest resident size while it computes, less that
before it, gradients of the embeddings included; time is the best of three. Fails where a tiled loss needs
more than 1/8 of the plain one's memory or more than 1.3 times its time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.losses import contrastive
from pretrain.objectives.clip import CLIPConfig

MEMORY, TIME = 1 / 8, 1.3
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_softmax(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Radford et al. 2021, arXiv:2103.00020 figure 3."""
    logits, own = scale * images @ texts.T, torch.arange(len(images))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def tiled_softmax(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    over_texts, over_images = contrastive.log_sums(images, texts, scale, _chunk())
    positive = scale * (images * texts).sum(dim=1)
    return ((over_texts - positive).mean() + (over_images - positive).mean()) / 2


def plain_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Zhai et al. 2023, arXiv:2303.15343 algorithm 1."""
    logits = scale * images @ texts.T + bias
    return -functional.logsigmoid((2 * torch.eye(len(images)) - 1) * logits).sum() / len(images)


def tiled_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return contrastive.sigmoid_pairs(images, texts, scale, bias, first=0, chunk=_chunk())


def _chunk() -> int:
    """As `objective.chunk` is when nobody sets it."""
    chunk = CLIPConfig.model_fields["chunk"].default
    assert isinstance(chunk, int)
    return chunk


LOSSES: dict[str, Loss] = {
    "softmax, plain": plain_softmax, "softmax, tiled": tiled_softmax,
    "sigmoid, plain": plain_sigmoid, "sigmoid, tiled": tiled_sigmoid,
}  # fmt: skip


def resident(highest: bool) -> int:
    """Bytes of this process in memory: now, or at most so far."""
    name = "VmHWM" if highest else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure(name: str, batch: int, width: int) -> dict[str, float]:
    """Extra bytes, seconds, loss and the norm of the images' gradient of one loss, in this process."""
    generator = torch.Generator().manual_seed(0)
    images = functional.normalize(torch.randn(batch, width, generator=generator), dim=1)
    noise = torch.randn(batch, width, generator=generator) / width**0.5
    texts = functional.normalize(images + 2 * noise, dim=1)
    inputs = [t.requires_grad_() for t in (images, texts, torch.tensor([30.0]), torch.tensor([-10.0]))]
    before, seconds = resident(highest=False), []
    for _ in range(3):
        for tensor in inputs:
            tensor.grad = None
        started = time.perf_counter()
        loss = LOSSES[name](*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - started)
    assert images.grad is not None
    return {
        "bytes": resident(highest=True) - before, "seconds": min(seconds),
        "loss": loss.item(), "gradient": float(images.grad.norm()),
    }  # fmt: skip


def in_a_process(name: str, batch: int, width: int, threads: int) -> dict[str, float]:
    arguments = ["--only", name, "--batch", str(batch), "--width", str(width), "--threads", str(threads)]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def main(arguments: list[str]) -> int:
    """Measure, print a table; 1 where a bound is passed or a tiled loss differs from its plain form."""
    parser = argparse.ArgumentParser(description="contrastive losses in tiles: memory and time")
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(LOSSES), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.only:
        print(json.dumps(measure(chosen.only, chosen.batch, chosen.width)))
        return 0
    print(
        f"{chosen.batch} x {chosen.batch} pairs of width {chosen.width}, {chosen.threads} threads, tiles of"
    )
    print(f"{_chunk()}; forward and backward\n\n| loss | extra memory | seconds | memory | time |")
    print("|---|---|---|---|---|")
    held = True
    for kind in ("softmax", "sigmoid"):
        plain, tiled = (
            in_a_process(f"{kind}, {form}", chosen.batch, chosen.width, chosen.threads)
            for form in ("plain", "tiled")
        )
        memory, duration = tiled["bytes"] / plain["bytes"], tiled["seconds"] / plain["seconds"]
        for form, found, ratios in (
            ("plain", plain, "1 | 1"),
            ("tiled", tiled, f"{memory:.3f} | {duration:.2f}"),
        ):
            print(
                f"| {kind}, {form} | {found['bytes'] / 2**20:.0f} MiB | {found['seconds']:.2f} | {ratios} |"
            )
        same = all(abs(tiled[k] - plain[k]) <= 1e-4 * abs(plain[k]) for k in ("loss", "gradient"))
        held = held and same and memory <= MEMORY and duration <= TIME
    print(f"\nbounds: memory {MEMORY}, time {TIME}: {'held' if held else 'NOT held'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
