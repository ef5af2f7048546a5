"""Optimizers, their parameter groups, and the learning rate's scaling with the global batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import pydantic
import torch
from torch import nn

from configs.errors import ConfigError
from configs.loading import Config
from pretrain.clock import Duration, Progress
from pretrain.objective import ParamGroup, trainable
from pretrain.ports import StepSettings
from pretrain.schedules import ScheduleName, WarmupStart, dropped, half_cosine, warmup_then

Schedule = Callable[[Progress], StepSettings]
MakeOptimizer = Callable[[Sequence[ParamGroup]], torch.optim.Optimizer]


class OptimizerConfig(Config):
    """An optimizer with its schedule. Give `base_lr` (scaled by batch / 256) or `lr` (as it is), not both."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    base_lr: float | None = pydantic.Field(None, gt=0)
    lr: float | None = pydantic.Field(None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = pydantic.Field(1e-8, gt=0)
    momentum: float = pydantic.Field(0.9, ge=0, lt=1)  # of sgd and lars
    trust: float = pydantic.Field(0.001, gt=0)  # of lars: a layer's step over its weights' norm, at rate 1
    weight_decay: float = pydantic.Field(0.05, ge=0)
    decays: Literal["paper", "matrices"] = "paper"  # matrices: no bias, norm, position, token or scale either
    final_weight_decay: float | None = pydantic.Field(None, ge=0)  # reached by half a cosine; None: constant
    schedule: ScheduleName = "cosine"
    warmup: Duration = Duration(0, "steps")
    warmup_from: WarmupStart = "zero"  # step k of w has rate k / w of the peak; one: (k + 1) / w
    final_lr: float = pydantic.Field(0.0, ge=0)
    milestones: tuple[Duration, ...] = ()  # of `schedule: step`: where lr is multiplied by `drop`
    drop: float = pydantic.Field(0.1, gt=0, lt=1)

    @pydantic.model_validator(mode="after")
    def _one_rate(self) -> OptimizerConfig:
        if (self.base_lr is None) == (self.lr is None):
            raise ValueError("set exactly one of base_lr (scaled by batch / 256) and lr")
        if self.warmup.unit == "min":
            raise ValueError("warmup: a schedule can't be measured in minutes; use steps, samples or epochs")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("milestones: `schedule: step` needs them, and no other schedule has any")
        if any(milestone.unit == "min" for milestone in self.milestones):
            raise ValueError("milestones: use steps, samples or epochs")
        return self

    def peak_lr(self, batch_size: int) -> float:
        """Linear scaling: lr = base_lr x batch / 256 (Goyal et al. 2017, arXiv:1706.02677 §2.1)."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * batch_size / 256

    def stated(self, batch_size: int) -> str:
        """The learning rate as the log says it."""
        if self.lr is not None:
            return f"lr = {self.lr:g}"
        return f"lr = {self.base_lr:g} x {batch_size} / 256 = {self.peak_lr(batch_size):g}"

    def schedule_for(self, batch_size: int, dataset_size: int, total_steps: int) -> Schedule:
        """Settings of the step that `progress` is about to make.

        Raises `ConfigError` where the warm-up is longer than the training.
        """
        warmup = self.warmup.steps(batch_size, dataset_size)
        if warmup > total_steps:
            raise ConfigError(
                f"optimizer.warmup: {self.warmup} is {warmup} steps, the training has only {total_steps}"
            )
        peak = self.peak_lr(batch_size)
        milestones = [milestone.steps(batch_size, dataset_size) for milestone in self.milestones]

        def settings(progress: Progress) -> StepSettings:
            lr = warmup_then(
                self.schedule, progress.step, total_steps, warmup, peak, self.final_lr, self.warmup_from
            )
            lr *= dropped(progress.step, milestones, self.drop)
            return StepSettings(lr=lr, weight_decay=self.weight_decay_at(progress.step / total_steps))

        return settings

    def weight_decay_at(self, fraction: float) -> float:
        """At a fraction of the training."""
        if self.final_weight_decay is None:
            return self.weight_decay
        return half_cosine(fraction, self.weight_decay, self.final_weight_decay)

    def regroup(self, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
        """An objective's groups are its paper's; `decays: matrices` frees all but weight matrices."""
        if self.decays == "paper":
            return list(groups)
        found = []
        for group in groups:
            free = [(n, p) for n, p in group.parameters if not _is_matrix(n, p)]
            kept = [(n, p) for n, p in group.parameters if _is_matrix(n, p)]
            found += [dataclasses.replace(group, parameters=kept)] if kept else []
            found += [dataclasses.replace(group, parameters=free, weight_decay_scale=0.0)] if free else []
        return found

    def require_possible(self, zero_stage: int) -> None:
        """Refuse LARS with ZeRO. Raises `ConfigError`."""
        if self.name == "lars" and zero_stage:
            raise ConfigError(
                f"train.zero_stage: found {zero_stage}, with optimizer.name=lars it must be 0: LARS needs "
                "each layer's weights whole, and ZeRO shares flattened ones out among ranks"
            )

    def make(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """The torch optimizer over `groups`, in order; the engine scales each group's rate and decay."""
        tensors = [{"params": [p for _, p in group.parameters]} for group in groups]
        rate = self.lr or self.base_lr or 0.0
        if self.name == "sgd":
            return torch.optim.SGD(tensors, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.name == "lars":
            return LARS(tensors, rate, self.momentum, self.weight_decay, self.trust)
        return torch.optim.AdamW(
            tensors, lr=rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


_NO_MATRICES = ("pos_embed", "positional_embedding", "_token", "class_embedding")
"""Ends of the names of positions and tokens in timm's and open_clip's networks, whatever their shape."""


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.squeeze().ndim > 1 and not name.endswith(_NO_MATRICES)


class LARS(torch.optim.Optimizer):
    """SGD with momentum, its steps scaled layer by layer (You et al. 2017, arXiv:1708.03888 algorithm 1).

    d = gradient + decay w; m <- momentum m + trust |w| / |d| d; w <- w - lr m. Vectors (biases, gains) take
    plain SGD without decay, as in the self-supervised recipes (facebookresearch/moco-v3, optimizer.py).
    Parameters must be whole, each with its own shape.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float, momentum: float, weight_decay: float, trust: float
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; nothing waits for the device."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                change = p.grad
                if p.ndim > 1:
                    change = change.add(p, alpha=group["weight_decay"])
                    ratio = group["trust"] * p.norm() / change.norm()
                    # Weights or gradients of zero length (a fresh layer) are taken as they are.
                    change = change * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                moment = state["momentum_buffer"]
                moment.mul_(group["momentum"]).add_(change)
                p.add_(moment, alpha=-group["lr"])


def groups_without_decay(module: nn.Module, exempt: Callable[[str, nn.Parameter], bool]) -> list[ParamGroup]:
    """Two groups of the trainable parameters: with weight decay, and those that are `exempt` from it."""
    named = list(trainable(module))
    decayed = [(n, p) for n, p in named if not exempt(n, p)]
    free = [(n, p) for n, p in named if exempt(n, p)]
    return [ParamGroup(decayed), ParamGroup(free, weight_decay_scale=0.0)]


def without_decay_on_vectors(module: nn.Module) -> list[ParamGroup]:
    """Biases and 1-d parameters free of weight decay, everything else (tokens too) with it.

    timm's `param_groups_weight_decay` as facebookresearch/mae main_pretrain.py calls it, without a skip list.
    """
    return groups_without_decay(module, lambda name, p: p.ndim <= 1 or name.endswith(".bias"))
