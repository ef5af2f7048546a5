"""How an engine computes: precision, what is kept in memory and where. None of it changes what is learnt."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Literal

import pydantic
import torch
from torch import nn

from configs.errors import ConfigError
from configs.loading import Config
from pretrain.engines.blocks import blocks

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]


def on_gpu(device: Device) -> bool:
    """Whether ranks of this machine compute on GPUs."""
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def require_devices(device: Device, ranks: int, gpu: bool | None = None) -> None:
    """Refuse ranks that wouldn't have a device of their own. Raises `ConfigError`.

    `ranks`: of this machine; `gpu`: whether they will have GPUs where they run on other machines, whose
    number is the cluster's to know; None where they run on this one.
    """
    if gpu is not None:
        if device == "cuda" and not gpu:
            raise ConfigError("run.device: cuda, and the cluster's gpus_per_node is 0; use auto or cpu")
        return
    if not on_gpu(device):
        return
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        raise ConfigError("run.device: cuda, and torch sees no GPU here; use auto or cpu")
    if ranks > there:
        count = "one GPU is" if there == 1 else f"{there} GPUs are"
        raise ConfigError(
            f"--nproc: {ranks} ranks, each with a GPU of its own, and {count} here; use --nproc {there}, or "
            "run.device=cpu to train on the processor"
        )


class EngineConfig(Config):
    """The engine's part of the `train` section."""

    precision: Precision = "bf16"
    # Products of fp32 in TF32 on a GPU: 10 bits of mantissa, also in the fp32 parts of bf16 and fp16 runs,
    # which are there because they need more.
    tf32: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_clip: float = pydantic.Field(0.0, ge=0)  # largest global L2 norm; 0 is off
    activation_checkpointing: bool = False  # keep a block's input only, and compute the rest again
    compile: Literal["blocks"] | None = None  # torch.compile, block by block
    offload: Literal["optimizer"] | None = None  # masters and moments in host memory, stepped by the CPU

    @property
    def autocast(self) -> torch.dtype | None:
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def require_device(self, gpu: bool | None = None, device: Device = "auto") -> None:
        """Refuse a precision that the ranks' devices don't compute in. Raises `ConfigError`.

        `gpu`: whether ranks have one, where they run on other machines; None where they run on this one.
        """
        if self.precision != "fp16" or (on_gpu(device) if gpu is None else gpu and device != "cpu"):
            return
        where = "none is here" if gpu is None else "the cluster's gpus_per_node is 0"
        where = "run.device is cpu" if device == "cpu" else where
        raise ConfigError(f"train.precision: fp16 needs a GPU, and {where}; use bf16 or fp32")

    def require_possible(
        self, objective: nn.Module, gpu: bool | None = None, device: Device = "auto"
    ) -> None:
        """Refuse, before a process group starts, what can't be done where it will run. Raises `ConfigError`.

        `objective` may be on the meta device. `gpu`: see `require_device`; of other machines nothing else
        is known.
        """
        self.require_device(gpu, device)
        if self.offload and self.zero_stage == 0:
            raise ConfigError(
                "train.offload: optimizer needs train.zero_stage of 1, 2 or 3, found 0: "
                "without ZeRO there are no masters apart from the parameters"
            )
        if self.compile and self.zero_stage == 3:
            raise ConfigError(
                f"train.compile: {self.compile} goes with train.zero_stage 0, 1 and 2, found 3, "
                "whose parameters come and go while a block runs; change one of them"
            )
        if (self.activation_checkpointing or self.compile) and not blocks(objective):
            setting = "activation_checkpointing" if self.activation_checkpointing else "compile"
            raise ConfigError(
                f"train.{setting}: found no repeated blocks in this model; leave it off, "
                "or use an encoder that is built of blocks, such as a ViT or a ResNet"
            )
        if self.compile and gpu is None and (missing := _missing_for_compile()):
            raise ConfigError(
                f"train.compile: {self.compile} needs {missing}, which isn't here; install it or leave it off"
            )


def _missing_for_compile() -> str | None:
    """What torch.compile lacks on this machine."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
        compilers = ("cc", "gcc", "clang")
        named = os.environ.get("CC")
    else:
        compilers = ("g++", "c++", "clang++")
        named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([named] if named else compilers)):
        return None
    return f"a compiler ({named or ', '.join(compilers)})"
