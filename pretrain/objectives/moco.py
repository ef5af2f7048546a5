"""Momentum contrast: two views of an image should be nearest among a queue of other images' keys.

He et al. 2019, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722,
algorithm 1) and Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning" (arXiv:2003.04297):
v1 and v2 differ in head, temperature and augmentation alone, which are settings here.

    q = unit(head(encoder(view 1)))        k = unit(head'(encoder'(view 2))), no gradient
    loss = -log  exp(q k / T) / (exp(q k / T) + sum over the queue of exp(q k_j / T))
    after an applied step: encoder' <- m encoder' + (1 - m) encoder, and the step's keys enter the queue

All keys of a global batch are made before its first query, by all ranks together and from permuted images, so
that batch norm can't tell which key belongs to a query. Every micro-batch sees the queue as it was at the
step's start.

Departure: with `batch_norm: grouped:N` the statistics are those of N consecutive samples of the (permuted)
global batch on any number of ranks, so that one process trains as many do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from data_pipeline.randomness import uniform
from data_pipeline.types import Batch, ViewSpec
from pretrain import collectives, encoders
from pretrain.clock import Progress
from pretrain.losses import contrastive
from pretrain.objective import (
    BuildContext,
    LossOutput,
    Objective,
    ObjectiveConfig,
    ParamGroup,
    Update,
    Weights,
    trainable,
)
from pretrain.parts import collapse, heads, teacher
from pretrain.parts.augmentation import Augmentation
from pretrain.parts.batch_norm import Spelled, convert, has_batch_norm, parse, require_samples
from pretrain.parts.precision import autocast
from pretrain.parts.queue import Queue

KEY_ORDER = 1001
"""Purpose number of the keys' permutation among all that is drawn from a seed."""


class MoCoConfig(ObjectiveConfig):
    """Defaults are v2's. v1: `head: linear`, `temperature: 0.07` and weaker views."""

    needs: ClassVar[frozenset[str]] = frozenset({"views"})
    slow_encoders: ClassVar[Mapping[Weights, str]] = {"teacher": "teacher_encoder", "ema": "teacher_encoder"}

    name: str = "moco"
    width: int = pydantic.Field(128, gt=0)  # of keys and queries
    head: Literal["linear", "mlp"] = "mlp"
    temperature: float = pydantic.Field(0.2, gt=0)
    momentum: float = pydantic.Field(0.999, ge=0, le=1)
    queue: int = pydantic.Field(65_536, gt=0)
    batch_norm: Spelled = "shuffle"  # shuffle (per rank, as in the paper), sync, grouped:N
    augmentation: Augmentation = Augmentation(jitter=0.8, grayscale=0.2, blur=0.5)

    def views(self, image_size: tuple[int, int]) -> Sequence[ViewSpec]:
        return [self.augmentation.view(image_size)] * 2

    def compared(self, batch_size: int) -> Mapping[str, int]:
        return {"objective.queue": self.queue, "train.batch_size": batch_size}

    def build(self, context: BuildContext) -> MoCo:
        require_samples(self.batch_norm, context.encoder)
        kind, size = parse(self.batch_norm)
        if kind == "grouped" and context.micro_batch_size % size:
            raise ConfigError(
                f"objective.batch_norm: found grouped:{size}, whose {size} must divide the micro-batch of "
                f"{context.micro_batch_size} samples"
            )
        if self.queue > context.dataset_size:
            raise ConfigError(
                f"objective.queue: found {self.queue}, larger than the {context.dataset_size} samples of the "
                "data: an image would be compared with its own old keys; use fewer keys"
            )
        return MoCo(self, context)


class MoCo(Objective):
    """Encoder and head, their slow copies, and the queue of keys."""

    needs_whole_share: ClassVar[bool] = True

    def __init__(self, config: MoCoConfig, context: BuildContext) -> None:
        super().__init__()
        self.config, self.autocast_dtype = config, context.autocast
        self.micro_batch_size, self.batch_size = context.micro_batch_size, context.batch_size
        self.encoder = convert(context.encoder, *parse(config.batch_norm))
        feature = encoders.width(self.encoder)
        hidden = [feature] if config.head == "mlp" else []
        self.head = heads.mlp([feature, *hidden, config.width])
        self.teacher_encoder, self.teacher_head = teacher.copy_of(self.encoder), teacher.copy_of(self.head)
        self.queue = Queue(config.queue, config.width)
        self.permutes = has_batch_norm(self.encoder)

    def start_from(self, load: Callable[[nn.Module], None]) -> None:
        super().start_from(load)
        self.teacher_encoder.load_state_dict(self.encoder.state_dict())

    def before_step(self, share: Batch, progress: Progress) -> tuple[Tensor, ...]:
        """The keys of this rank's share, (B, D), made by all ranks together: collective."""
        images = share.views[1]
        if not self.permutes:
            return (self.encode_keys(images),)
        everyones = collectives.gather(images)
        order = self.key_order(progress, len(everyones), images.device)
        parts = order.chunk(collectives.ranks())
        permuted = collectives.gather(self.encode_keys(everyones[parts[collectives.rank()]]))
        keys = torch.empty_like(permuted).index_copy_(0, order, permuted)
        return (keys.chunk(collectives.ranks())[collectives.rank()],)

    def key_order(self, progress: Progress, count: int, device: torch.device) -> Tensor:
        """A permutation of the global batch that is the same on every rank and of its own for every batch."""
        seed = torch.tensor([progress.samples], device=device)
        return uniform(seed, KEY_ORDER, count)[0].argsort(stable=True)

    def encode_keys(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, D) unit float32, in micro-batches."""
        parts = torch.split(images, self.micro_batch_size)
        with torch.no_grad(), autocast(images.device, self.autocast_dtype):
            keys = [self.teacher_head(encoders.features(self.teacher_encoder, part)) for part in parts]
        return functional.normalize(torch.cat(keys).float(), dim=1)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        with autocast(batch.views[0].device, self.autocast_dtype):
            query = self.head(encoders.features(self.encoder, batch.views[0]))
        query = functional.normalize(query.float(), dim=1)
        # Outside of training nothing was prepared.
        [keys] = batch.prepared or (self.encode_keys(batch.views[1]),)
        loss, logits = contrastive.info_nce_with_queue(
            query, keys, self.queue.keys.clone(), self.config.temperature
        )
        return LossOutput(loss, self._metrics(query.detach(), logits.detach()), (keys,))

    @torch.no_grad()
    def _metrics(self, query: Tensor, logits: Tensor) -> dict[str, Tensor]:
        similarity = logits * self.config.temperature
        return collapse.spread(query) | {
            "positive_similarity": similarity[:, 0].mean(),
            "negative_similarity": similarity[:, 1:].mean(),
            "top1": (logits.argmax(dim=1) == 0).float().mean() * 100,
            "queue_filled": self.queue.filled(),
            "queue_age": self.queue.age(self.batch_size),
        }

    def after_step(self, update: Update, progress: Progress, output: LossOutput) -> None:
        update.lerp(self.teacher_encoder, self.encoder, self.config.momentum)
        update.lerp(self.teacher_head, self.head, self.config.momentum)
        self.queue.enqueue(collectives.gather(output.rows[0]))

    def param_groups(self) -> list[ParamGroup]:
        """Weight decay on everything, as in the authors' code (facebookresearch/moco main_moco.py)."""
        return [ParamGroup(list(trainable(self)))]
