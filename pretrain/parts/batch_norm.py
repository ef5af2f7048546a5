"""Whose statistics a batch norm uses: a rank's own, all ranks', or those of fixed groups of samples.

Per-rank statistics make a loss depend on the number of ranks, and let a contrastive method cheat: query and
key of one image sit in the same batch. `grouped:N` normalises every N consecutive samples of the global batch
on their own, which is the same arithmetic on one rank and on a thousand.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from pretrain.collectives import gather, ranks

Kind = Literal["rank", "sync", "grouped"]


def parse(text: str) -> tuple[Kind, int]:
    """("grouped", 8) of "grouped:8"; ("rank", 0) of "rank" and "shuffle", ("sync", 0) of "sync".

    Raises ValueError with what is allowed.
    """
    found = re.fullmatch(r"grouped:([1-9]\d*)", text)
    if found and int(found[1]) > 1:
        return "grouped", int(found[1])
    if text in ("rank", "shuffle"):
        return "rank", 0
    if text == "sync":
        return "sync", 0
    raise ValueError("allowed: shuffle, sync, grouped:N with N of at least 2, such as grouped:8")


def _spelled(text: str) -> str:
    parse(text)
    return text


Spelled = Annotated[str, AfterValidator(_spelled)]
"""A setting that `parse` reads."""


class GroupedBatchNorm(nn.BatchNorm2d):
    """Batch norm over groups of `size` consecutive samples; (B, C) or (B, C, H, W)."""

    size: int

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank will do."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if len(input) % self.size:
            raise ValueError(f"{len(input)} samples can't be cut into groups of {self.size}")
        groups, channels = len(input) // self.size, input.shape[1]
        mean = torch.zeros(groups, channels, device=input.device)
        variance = torch.ones(groups, channels, device=input.device)
        # Group by group: folding the groups into channels for one call would give up channels-last order.
        parts = [
            functional.batch_norm(part, m, v, self.weight, self.bias, True, 1.0, self.eps)
            for part, m, v in zip(torch.split(input, self.size), mean, variance, strict=True)
        ]
        _remember(self, mean.mean(0), variance.mean(0))
        return torch.cat(parts)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all ranks' samples, as many on each, on any device; (B, C) or (B, C, H, W)."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank will do."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        mean, variance = _moments(x)
        count = x.numel() // x.shape[1] * ranks()
        _remember(self, mean.detach(), variance.detach() * count / max(count - 1, 1))
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        # The mean goes first: x * scale and mean * scale may be large and nearly equal.
        normalised = (x - mean.view(shape)) * scale.view(shape)
        return (normalised if self.bias is None else normalised + self.bias.view(shape)).to(input.dtype)


class _ThenActivation(nn.BatchNorm2d):
    """timm's batch norms hold the activation behind them; so do those that replace them."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]


class GroupedBatchNormAct(_ThenActivation, GroupedBatchNorm):
    """`GroupedBatchNorm` with an activation."""


class SyncBatchNormAct(_ThenActivation, SyncBatchNorm):
    """`SyncBatchNorm` with an activation."""


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,) each, of all ranks' (B, C, ...) float32 samples. With gradient.

    From each rank's own mean and variance (Chan et al. 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances", eq. 2.1): the mean of squares less the square of the mean would lose all its
    digits where the mean is far from 0.
    """
    over = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x, over, correction=0)
    # (R, C) each; every rank has as many samples.
    means, variances = gather(torch.stack([mean, variance])[None]).unbind(1)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


@torch.no_grad()
def _remember(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics, unless this is a second pass over the same samples."""
    if layer.running_mean is None or layer.running_var is None or recomputing():
        return
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked += 1
    momentum = layer.momentum if layer.momentum is not None else 1 / float(layer.num_batches_tracked)
    layer.running_mean.lerp_(mean, momentum)
    layer.running_var.lerp_(variance, momentum)


def recomputing() -> bool:
    """Whether a backward pass is running this forward again, for activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def convert(module: nn.Module, kind: Kind, size: int = 0) -> nn.Module:
    """Replace every batch norm in `module`, in place; "rank" leaves it as it is.

    Raises `ConfigError` for a batch norm of a kind that can't be replaced.
    """
    if kind == "rank":
        return module
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, _converted(layer, kind, size))
    return module


def _converted(layer: nn.modules.batchnorm._BatchNorm, kind: Kind, size: int) -> nn.Module:
    acts = isinstance(layer, nn.BatchNorm2d) and {name for name, _ in layer.named_children()} == {
        "drop",
        "act",
    }
    if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d) and not acts:
        raise ConfigError(
            f"objective.batch_norm: {type(layer).__name__} can't be made {kind}; use rank, or another encoder"
        )
    grouped, sync = (GroupedBatchNormAct, SyncBatchNormAct) if acts else (GroupedBatchNorm, SyncBatchNorm)
    new: nn.BatchNorm2d = grouped(1) if kind == "grouped" else sync(1)
    new.__dict__.update({k: v for k, v in layer.__dict__.items() if not k.startswith("_forward")})
    if isinstance(new, GroupedBatchNorm):
        new.size = size
    return new


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def require_samples(text: str, encoder: nn.Module) -> None:
    """Refuse groups of samples where a batch norm is given tokens, as many as it likes a sample.

    Raises `ConfigError`.
    """
    if parse(text)[0] == "grouped" and any(isinstance(m, nn.BatchNorm1d) for m in encoder.modules()):
        raise ConfigError(
            f"objective.batch_norm: found {text}, and this encoder's batch norms are given tokens, not "
            f"samples; "
            "use rank or sync, or another encoder"
        )


def require_independent_parts(
    text: str, encoder: nn.Module, micro_batch_size: int, accumulation: int
) -> None:
    """Refuse a batch norm through which a sample's embedding would depend on the cut into micro-batches.

    For losses over the whole batch; `text` is a setting that `parse` reads. Raises `ConfigError`.
    """
    if not has_batch_norm(encoder):
        return
    require_samples(text, encoder)
    kind, size = parse(text)
    if kind == "grouped" and micro_batch_size % size:
        raise ConfigError(
            f"objective.batch_norm: found grouped:{size}, whose {size} must divide the micro-batch of "
            f"{micro_batch_size} samples"
        )
    if kind != "grouped" and accumulation > 1:
        raise ConfigError(
            f"train.micro_batch_size: found {micro_batch_size}, {accumulation} micro-batches a step, which "
            f"objective.batch_norm={text} doesn't allow with a loss over the whole batch; set "
            "objective.batch_norm=grouped:N, an encoder without batch norm, or no train.micro_batch_size"
        )
