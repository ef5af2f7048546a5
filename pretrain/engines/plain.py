"""One process, a torch optimizer and nothing else: an engine to test an objective's step with.

A plug-in's author has it without DeepSpeed and without a process group. Runs train on the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from pretrain.clock import Progress
from pretrain.objective import LossOutput, Objective, ParamGroup
from pretrain.ports import StepSettings


@dataclass(frozen=True)
class PlainUpdate:
    """An applied update; see `objective.Update`."""

    grad_norm: Tensor  # () float32

    @torch.no_grad()
    def lerp(self, teacher: nn.Module, student: nn.Module, momentum: float) -> None:
        """Teacher <- momentum * teacher + (1 - momentum) * student, by parameter name."""
        students = dict(student.named_parameters())
        for name, parameter in teacher.named_parameters():
            parameter.lerp_(students[name], 1.0 - momentum)

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a whole parameter."""
        parameter.copy_(value)

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, highest: float, lowest: float | None = None) -> None:
        """Bound a parameter."""
        parameter.clamp_(lowest, highest)


class PlainEngine:
    """What a step asks of `ports.Engine`. `make` gets the objective's groups, as `OptimizerConfig.make`."""

    device = torch.device("cpu")

    def __init__(
        self,
        objective: Objective,
        make: Callable[[Sequence[ParamGroup]], torch.optim.Optimizer],
        accumulation: int = 1,
    ) -> None:
        self.objective, self.accumulation = objective, accumulation
        self.groups = objective.param_groups()
        self.optimizer = make(self.groups)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """The objective's own."""
        output = self.objective(batch, progress)
        assert isinstance(output, LossOutput)
        return output

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's part of the gradient of their mean."""
        torch.autograd.backward(loss / self.accumulation)

    def step(self, settings: StepSettings) -> PlainUpdate | None:
        """Apply the gradients; None, with nothing changed, where they aren't finite."""
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if applied := bool(norm.isfinite()):
            for group, ours in zip(self.optimizer.param_groups, self.groups, strict=True):
                group["lr"] = settings.lr * ours.lr_scale
                group["weight_decay"] = settings.weight_decay * ours.weight_decay_scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        return PlainUpdate(norm.detach()) if applied else None

    @contextmanager
    def whole_parameters(self) -> Iterator[nn.Module]:
        """They are whole."""
        yield self.objective
