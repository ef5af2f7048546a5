"""The words every room of `pretrain` shares: time, batches in, losses out, and the ports between them.

Nothing here holds a reference to the trainer, and nothing here knows an objective, a cluster or an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic_core import CoreSchema, core_schema
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.loading import Config
from data_pipeline.types import Batch, ViewSpec

BEYOND_STEPS = "after the step"
"""The phase of a loop that may take as long as it likes: saving and evaluating aren't hanging."""

Unit = Literal["steps", "samples", "epochs", "min"]
_UNITS: Mapping[str, Unit] = {
    "step": "steps", "steps": "steps", "sample": "samples", "samples": "samples",
    "epoch": "epochs", "epochs": "epochs", "min": "min", "minute": "min", "minutes": "min",
}  # fmt: skip


@dataclass(frozen=True)
class Duration:
    """A length of training: "800 epochs", "100_000 steps", "12.8e9 samples".

    "30 min" is for saving, evaluating and stopping only.
    """

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Duration:
        number, _, unit = text.strip().partition(" ")
        try:
            amount = float(number)
        except ValueError:
            amount = -1.0
        known = _UNITS.get(unit.strip().lower())
        if known is None or not 0 <= amount < float("inf"):
            raise ValueError('a duration reads "12 steps", "800 epochs", "12.8e9 samples" or "30 min"')
        return cls(amount, known)

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    def steps(self, batch_size: int, dataset_size: int) -> int:
        """Whole optimizer steps, rounded up so that every sample asked for is seen.

        Raises ValueError for minutes.
        """
        match self.unit:
            case "steps":
                samples = self.amount * batch_size
            case "samples":
                samples = self.amount
            case "epochs":
                samples = self.amount * dataset_size
            case "min":
                raise ValueError("minutes don't fix a number of steps")
        return -(-round(samples) // batch_size)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        def read(value: Any) -> Duration:
            if isinstance(value, Duration):
                return value
            return cls.parse(value if isinstance(value, str) else "")

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.to_string_ser_schema()
        )


@dataclass(frozen=True)
class Progress:
    """The clock of a run. Schedules are functions of it, and it moves on applied steps only."""

    step: int  # applied optimizer steps so far
    samples: int  # samples consumed so far: the data position, which moves on skipped steps too
    total_steps: int
    dataset_size: int  # samples in one epoch

    @property
    def fraction(self) -> float:
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        return self.samples / self.dataset_size

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    def consumed(self, samples: int) -> Progress:
        return replace(self, samples=self.samples + samples)

    def applied(self) -> Progress:
        return replace(self, step=self.step + 1)


class LossOutput(NamedTuple):
    """What a forward pass gives. A NamedTuple because ZeRO-3 walks tuples for tensors and not dataclasses."""

    loss: Tensor  # () float32: mean over the micro-batch
    metrics: Mapping[str, Tensor]  # () tensors on the device, detached: averaged over ranks when they are due


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share optimizer settings; the scales multiply the scheduled values."""

    parameters: Sequence[tuple[str, nn.Parameter]]
    weight_decay_scale: float = 1.0
    lr_scale: float = 1.0


@dataclass(frozen=True)
class BuildContext:
    """Run-time facts an objective is built from, none of which is in its config."""

    encoder: nn.Module
    image_size: tuple[int, int]  # height, width in pixels
    dataset_size: int
    batch_size: int  # global
    autocast: torch.dtype | None  # dtype of autocast inside forward; None trains in fp32
    world_size: int = 1
    accumulation: int = 1  # micro-batches of a rank's share
    vocabulary: int | None = None  # tokens that the data's tokenizer knows; None where there is none
    text_length: int | None = None  # tokens of a text as the data give it

    @property
    def micro_batch_size(self) -> int:
        """Samples a rank takes at once."""
        return self.batch_size // self.world_size // self.accumulation


class Objective(nn.Module, ABC):
    """One pretext task: the very module that is wrapped, so that DeepSpeed and compile hook `forward`."""

    encoder: nn.Module  # what an export saves

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress) -> LossOutput: ...

    def start_from(self, load: Callable[[nn.Module], None]) -> None:
        """Begin with the weights that `load` puts into an encoder; teachers are to begin as its copies."""
        load(self.encoder)

    needs_whole_share: ClassVar[bool] = False  # whether `before_step` is to be called

    def before_step(self, share: Batch, progress: Progress) -> None:
        """What a step needs of all its samples before their micro-batches come: keys, targets. No gradient.

        Collective; `share` is this rank's part of the global batch, its views as `forward` gets them.
        """

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]: ...

    def after_step(self, update: Update, progress: Progress) -> None:
        """Teacher, queue, clamps: called after an applied step, never after a skipped one."""

    def judge(self, batch: Batch) -> Mapping[str, Tensor]:
        """Figures of the pretext task itself on held-out data, () tensors: means over the batch."""
        return {}

    def pictures(self, batch: Batch) -> Mapping[str, Tensor]:
        """Name to (3, H, W) float image in [0, 1]: what a person would look at to judge this run."""
        return {}


Embeddings = tuple[Tensor, ...]
"""What a whole-batch loss compares: each (B, D), row i of all from sample i."""


class WholeBatchObjective(Objective):
    """A loss over the whole global batch, which can't be summed over micro-batches.

    Where a rank's share is larger than a micro-batch, embeddings are computed micro-batch by micro-batch and
    only they are kept; the backward pass computes each micro-batch again (GradCache, Gao et al. 2021,
    arXiv:2101.06983 §3). Gradients equal the uncut ones. The cut is at the output of `embed`.
    """

    micro_batch_size: int | None = None  # None: the whole share at once, nothing computed twice

    @abstractmethod
    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of some samples, each on its own: no sample may change another's."""

    @abstractmethod
    def loss(self, embeddings: Embeddings, progress: Progress) -> LossOutput:
        """This rank's part of the global loss: the mean over ranks is the loss of the global batch."""

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        if self.micro_batch_size is None or self.micro_batch_size >= len(batch):
            return self.loss(self.embed(batch), progress)
        parts = [
            checkpoint(self.embed, part, use_reentrant=False) for part in batch.split(self.micro_batch_size)
        ]
        return self.loss(tuple(torch.cat(rows) for rows in zip(*parts, strict=True)), progress)


Weights = Literal["model", "ema", "teacher"]
"""Which of a run's encoders: what the gradient trains, a running average of it, or what teaches it."""


class ObjectiveConfig(Config, ABC):
    """Settings of an objective. `name: mae` is `objectives/mae.py`; a dotted name imports a plug-in."""

    name: str
    needs: ClassVar[frozenset[str]] = frozenset({"views"})  # batch fields: views, tokens, target, index
    slow_encoders: ClassVar[Mapping[Weights, str]] = {}  # what an export may take besides: submodule's name

    @abstractmethod
    def views(self, image_size: tuple[int, int]) -> Sequence[ViewSpec]: ...

    def compared(self, batch_size: int) -> Mapping[str, int]:
        """Samples that one is told apart from at a time, by the setting that says how many; none: not at all.

        Together they have to be different ones, or an image would be its own negative.
        """
        return {}

    @abstractmethod
    def build(self, context: BuildContext) -> Objective: ...


class Update(Protocol):
    """An applied optimizer step, as an objective may use it. Right under every ZeRO stage."""

    grad_norm: Tensor  # () float32: global L2 norm before clipping

    def lerp(self, teacher: nn.Module, student: nn.Module, momentum: float) -> None:
        """Teacher <- momentum * teacher + (1 - momentum) * student, parameter by parameter."""

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a whole parameter, its fp32 master included."""

    def clamp(self, parameter: nn.Parameter, highest: float, lowest: float | None = None) -> None:
        """Bound a parameter from above, and from below where asked, its fp32 master included."""


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


def trainable(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
