"""Process and device state, seeding and rank-aware logging, through accelerate.

One process without a launcher is rank 0 of 1 with a real process group, so that the code path never forks.
CPU ranks talk over gloo and CUDA ranks over nccl.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState, init_empty_weights
from accelerate.logging import MultiProcessAdapter, get_logger
from accelerate.utils import set_seed
from torch import nn

from pretrain.engines.config import Device, on_gpu, require_devices

TIMEOUT = timedelta(minutes=30)
"""Longer than the longest work that rank 0 does alone (evaluation, publishing a checkpoint)."""


_STANDING = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
_ALONE = "KEEL_STANDS_ALONE"
"""Set where this process made up its own place; `stop` takes it back, so that a later run finds a port."""


@dataclass(frozen=True)
class Processes:
    """Where this process stands among the ranks of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(device: Device = "auto", timeout: timedelta = TIMEOUT) -> Processes:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Without them this process is alone. `device`: "cpu" or "cuda"; "auto" is CUDA where there is one. Raises
    `ConfigError` where this rank has no GPU of its own.
    """
    kind = "cuda" if on_gpu(device) else "cpu"
    if kind == "cuda":
        require_devices(device, 1 + int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        _stand_alone()
    options: dict[str, object] = {"timeout": timeout}
    if kind == "cpu":
        # Otherwise DeepSpeed would pick the GPU of a machine whose run was asked to stay on the CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # accelerate sets the thread count and warns unless it is told that this was thought of.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        options["backend"] = "gloo"  # without it every CPU rank believes that it is alone
    else:
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(local)
        options["device_id"] = local  # binds the communicator, so that barriers don't guess a device
    state = PartialState(cpu=kind == "cpu", **options)
    return Processes(
        state.process_index, state.num_processes, max(state.local_process_index, 0), state.device
    )


def stop() -> None:
    """Leave the process group. Safe to call twice, and after a failure."""
    if dist.is_initialized():
        dist.destroy_process_group()
    PartialState._reset_state()
    if os.environ.pop(_ALONE, None):
        for name in (*_STANDING, "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


def seed(value: int, per_rank: bool = False) -> None:
    """Seed Python, NumPy and torch: the same on all ranks to build a model, `per_rank` for dropout."""
    # accelerate's own per-rank seeding wants a whole Accelerator; a prime keeps neighbouring seeds apart.
    rank = PartialState().process_index if per_rank else 0
    set_seed((value + 1_000_003 * rank) % 2**32)


def logger(name: str) -> MultiProcessAdapter:
    """A logger that speaks on rank 0 only unless a call says `main_process_only=False`; needs `start`."""
    return get_logger(name)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a rank needs for the state of training, activations and communication buffers left out."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def memory_estimate(build: Callable[[], nn.Module], zero_stage: int, world_size: int) -> MemoryEstimate:
    """What training `build()` with AdamW takes, counted on the meta device: nothing is allocated.

    fp32 everywhere, as keel trains. Stages after Rajbhandari et al. 2020, arXiv:1910.02054 §5, with
    DeepSpeed's own addition: from stage 1 an fp32 master copy of the rank's share beside the parameters.
    """
    with init_empty_weights():
        module = build()
    trainable = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = 4 * sum(p.numel() for p in module.parameters() if not p.requires_grad)

    def share(size: int, from_stage: int) -> int:
        return -(-size // world_size) if zero_stage >= from_stage else size

    master = share(trainable, 1) if zero_stage else 0
    return MemoryEstimate(
        parameters=share(trainable, 3) + share(frozen, 3),
        gradients=share(trainable, 2),
        optimizer=master + 2 * share(trainable, 1),
    )


def _stand_alone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(_STANDING, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ[_ALONE] = "1"
