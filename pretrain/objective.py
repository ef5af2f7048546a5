"""The page that a researcher reads: what an objective is, is built from, gives, and may do after an update.

Nothing here holds a reference to the trainer, and nothing here knows an objective, a cluster or an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.loading import Config
from data_pipeline.types import Batch, ViewSpec
from pretrain.clock import Progress


class LossOutput(NamedTuple):
    """What a forward pass gives. A NamedTuple because ZeRO-3 walks tuples for tensors and not dataclasses."""

    loss: Tensor  # () float32: mean over the micro-batch
    metrics: Mapping[str, Tensor]  # () tensors on the device, detached: averaged over ranks when they are due
    rows: tuple[Tensor, ...] = ()  # each (B, ...): what `after_step` is to know of every sample


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

    def before_step(self, share: Batch, progress: Progress) -> tuple[Tensor, ...]:
        """What a step needs of all its samples before their micro-batches come: keys, targets. No gradient.

        Collective; `share` is this rank's part of the global batch, its views as `forward` gets them. Each
        tensor is (B, ...), row i made of sample i: they ride as `batch.prepared` and are cut with the
        samples. Nothing of a step is kept on the module: a step that is skipped then leaves nothing.
        """
        return ()

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]: ...

    def after_step(self, update: Update, progress: Progress, output: LossOutput) -> None:
        """Teacher, queue, clamps: called after an applied step, never after a skipped one.

        `output` is that of this rank's whole share: `output.rows` has a row for each of its samples, in the
        order of the share, detached.
        """

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
    arXiv:2101.06983 §3). Gradients equal the uncut ones. The cut is at the output of `embed`. What `loss`
    needs of `batch.prepared` goes through `embed`, as one of the embeddings.
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


def trainable(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
