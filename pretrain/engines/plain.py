"""One process, a torch optimizer and nothing else: an engine to test an objective's step with.

A plug-in's author has it without DeepSpeed and without a process group. Runs train on the real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
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
    """`ports.Engine` in one process. `make` gets the objective's groups, as `OptimizerConfig.make` does."""

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

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Model and buffers, with `extra` beside them; no moments."""
        tensors = {name: value.contiguous() for name, value in self.objective.state_dict().items()}
        save_file(tensors, directory / "model.safetensors")
        (directory / "extra.json").write_text(json.dumps(dict(extra)))

    def load(self, directory: Path) -> dict[str, Any]:
        """What `save` wrote; gives `extra` back."""
        self.objective.load_state_dict(load_file(directory / "model.safetensors"))
        extra: dict[str, Any] = json.loads((directory / "extra.json").read_text())
        return extra
