"""The ports between the loop and what it drives, tells and is judged by. Behind each is an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from pretrain.clock import Progress
from pretrain.objective import LossOutput, Update

BEYOND_STEPS = "after the step"
"""The phase of a loop that may take as long as it likes: saving and evaluating aren't hanging."""


@dataclass(frozen=True)
class StepSettings:
    """Scheduled values for one optimizer step."""

    lr: float
    weight_decay: float


class StagedState(Protocol):
    """The state of a run in host memory, which training no longer touches."""

    def write(self, directory: Path, then: Callable[[], None] | None = None) -> None:
        """Collectively write it into an empty folder, then call `then` on rank 0; may run in another thread.

        Raises the same `RunError` on every rank where one of them failed.
        """


class Engine(Protocol):
    """What the loop needs of a distributed training engine. DeepSpeed is one; nothing else knows it."""

    device: torch.device

    def forward(self, batch: Batch, progress: Progress) -> LossOutput: ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch; the engine divides by the number of micro-batches."""

    def step(self, settings: StepSettings) -> Update | None:
        """Apply the accumulated gradients; None where the update was skipped and nothing changed."""

    def whole_parameters(self) -> AbstractContextManager[nn.Module]:
        """The objective with every parameter whole on every rank, for reading (evaluation, pictures)."""

    def stage(self, extra: Mapping[str, Any]) -> StagedState:
        """Collectively copy to host memory what `save` writes; to be written before the next is staged."""

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Collectively write model, buffers, moments and counters, with `extra` (JSON values) beside them."""

    def load(self, directory: Path) -> dict[str, Any]:
        """Collectively restore what `save` wrote; gives `extra` back."""


@dataclass(frozen=True)
class StepReport:
    """What the loop tells its listeners after an applied step. Tensors stay on the device until due."""

    progress: Progress
    output: LossOutput  # this rank's mean over its share of the global batch
    update: Update
    settings: StepSettings
    data_wait: float  # seconds this rank waited for data
    seconds: float  # duration of the whole step
    busy: float = 0.0  # of these, waiting for data and forward and backward: what this rank did by itself


StopReason = Literal[
    "done", "stop_after", "early_stop", "time_limit", "terminated", "preempted", "interrupted"
]  # fmt: skip


class Listener(Protocol):
    """Something that acts after applied steps: trackers, the checkpointer, evaluators."""

    def after_step(self, report: StepReport) -> None: ...

    def finish(self, progress: Progress, reason: StopReason) -> None: ...


class Tracker(Protocol):
    """Somewhere numbers and pictures go. Only rank 0 has trackers; they see floats, never device tensors."""

    def log(self, row: Mapping[str, float | int]) -> None: ...

    def evaluated(self, progress: Progress, scores: Scores) -> None: ...

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None: ...

    def finish(self, status: str) -> None: ...


@dataclass(frozen=True)
class Scores:
    """An evaluator's result: `values["top1"]` and the like, in percent unless the name says otherwise."""

    kind: str
    values: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)  # (3, H, W) float32 in [0, 1]
