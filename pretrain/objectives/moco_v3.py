"""Momentum contrast without a queue: the other view of an image should be nearest among the batch's keys.

Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers" (arXiv:2104.02057,
algorithm 1 and §4), with the settings of the authors' code (facebookresearch/moco-v3, moco/builder.py).

    q_v = unit(predictor(projector(encoder(view v))))    k_v = unit(projector'(encoder'(view v))), no gradient
    ctr(q, k) = -2 T log  exp(q k+ / T) / sum over the global batch of exp(q k_j / T)
    loss = ctr(q_1, k_2) + ctr(q_2, k_1)
    after an applied step: encoder', projector' <- m of themselves + (1 - m) of the student, m from .99 to 1

A plain ViT has fixed sine-cosine positions and a patch projection that stays random, without which the
authors saw instable training. Heads as theirs: for a ViT three layers project and the predictor ends in
batch norm; for a ResNet two, and it doesn't. Batch norm in the heads is over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.types import Batch, ViewSpec
from pretrain import collectives, encoders
from pretrain.clock import Progress
from pretrain.encoders import vit
from pretrain.losses import contrastive
from pretrain.objective import (
    BuildContext,
    Embeddings,
    LossOutput,
    ObjectiveConfig,
    ParamGroup,
    Update,
    Weights,
    WholeBatchObjective,
    trainable,
)
from pretrain.parts import collapse, heads, teacher
from pretrain.parts.augmentation import Augmentation
from pretrain.parts.batch_norm import Spelled, convert, parse, require_independent_parts
from pretrain.parts.precision import autocast

_VIEW = Augmentation(crop_scale=(0.08, 1.0), jitter=0.8, saturation=0.2, grayscale=0.2)


class MoCoV3Config(ObjectiveConfig):
    """Defaults are the authors' for ViTs. For a ResNet-50: temperature 1 and crops from 0.2 of the image."""

    needs: ClassVar[frozenset[str]] = frozenset({"views"})
    slow_encoders: ClassVar[Mapping[Weights, str]] = {"teacher": "teacher_encoder", "ema": "teacher_encoder"}

    name: str = "moco_v3"
    width: int = pydantic.Field(256, gt=0)  # of keys and queries
    hidden: int = pydantic.Field(4096, gt=0)  # of projector and predictor
    temperature: float = pydantic.Field(0.2, gt=0)
    momentum: float = pydantic.Field(0.99, ge=0, le=1)  # at the start; 1 at the end
    freeze_patches: bool = True  # of a plain ViT: the patch projection keeps its random weights
    batch_norm: Spelled = "sync"  # inside the encoder: sync, rank (each its own statistics), grouped:N
    first: Augmentation = _VIEW.model_copy(update={"blur": 1.0})
    second: Augmentation = _VIEW.model_copy(update={"blur": 0.1, "solarize": 0.2})

    def views(self, image_size: tuple[int, int]) -> Sequence[ViewSpec]:
        return [self.first.view(image_size), self.second.view(image_size)]

    def compared(self, batch_size: int) -> Mapping[str, int]:
        return {"train.batch_size": batch_size}

    def build(self, context: BuildContext) -> MoCoV3:
        """Raises `ConfigError` where the encoder's batch norm and micro-batches don't fit."""
        micro_batch_size, accumulation = context.micro_batch_size, context.accumulation
        require_independent_parts(self.batch_norm, context.encoder, micro_batch_size, accumulation)
        return MoCoV3(self, context)


class MoCoV3(WholeBatchObjective):
    """Encoder, projector and predictor, and the slow copies of the first two."""

    def __init__(self, config: MoCoV3Config, context: BuildContext) -> None:
        super().__init__()
        self.config, self.autocast_dtype = config, context.autocast
        self.micro_batch_size = context.micro_batch_size
        self.encoder = convert(context.encoder, *parse(config.batch_norm))
        is_vit = encoders.is_vit(self.encoder)
        if vit.not_plain(self.encoder) is None:
            vit.initialise_as_moco_v3(self.encoder)
            vit.fix_positions(self.encoder)
            self.encoder.patch_embed.requires_grad_(not config.freeze_patches)
        hidden = [config.hidden] * (2 if is_vit else 1)
        self.projector = heads.mlp(
            [encoders.width(self.encoder), *hidden, config.width],
            batch_norm=True, last_batch_norm=True, bias=False,
        )  # fmt: skip
        self.predictor = heads.mlp(
            [config.width, config.hidden, config.width], batch_norm=True, last_batch_norm=is_vit, bias=False
        )
        for head in (self.projector, self.predictor):
            convert(head, "sync")
        self.teacher_encoder = teacher.copy_of(self.encoder)
        self.teacher_projector = teacher.copy_of(self.projector)

    def start_from(self, load: Callable[[nn.Module], None]) -> None:
        super().start_from(load)
        self.teacher_encoder.load_state_dict(self.encoder.state_dict())

    def embed(self, batch: Batch) -> Embeddings:
        """Features (B, D) of both views, the student's and then the teacher's: what no other sample changes.

        In this order a second pass, which ends when the student has what its gradient needs, leaves the
        teacher out.
        """
        with autocast(batch.views[0].device, self.autocast_dtype):
            own = [encoders.features(self.encoder, view) for view in batch.views]
            with torch.no_grad():
                theirs = [encoders.features(self.teacher_encoder, view) for view in batch.views]
        return (*own, *theirs)

    def loss(self, embeddings: Embeddings, progress: Progress) -> LossOutput:
        with autocast(embeddings[0].device, self.autocast_dtype):
            queries = [self.predictor(self.projector(own)) for own in embeddings[:2]]
            with torch.no_grad():
                keys = [self.teacher_projector(theirs) for theirs in embeddings[2:]]
        q1, q2, k1, k2 = (functional.normalize(x.float(), dim=1) for x in (*queries, *keys))
        loss = self._contrast(q1, k2) + self._contrast(q2, k1)
        metrics = collapse.spread(q1.detach()) | collapse.pairs(q1.detach() @ k2.T)
        metrics["teacher_momentum"] = loss.new_tensor(self.momentum_at(progress))
        return LossOutput(loss, metrics)

    def _contrast(self, query: Tensor, key: Tensor) -> Tensor:
        """2 T times the mean cross entropy of this rank's queries over the keys of all ranks."""
        temperature, first = self.config.temperature, collectives.rank() * len(query)
        all_keys = collectives.gather(key)
        return 2 * temperature * contrastive.info_nce(query, all_keys, temperature, first)

    def momentum_at(self, progress: Progress) -> float:
        return teacher.momentum_at(progress.fraction, self.config.momentum)

    def after_step(self, update: Update, progress: Progress, output: LossOutput) -> None:
        momentum = self.momentum_at(progress)
        update.lerp(self.teacher_encoder, self.encoder, momentum)
        update.lerp(self.teacher_projector, self.projector, momentum)

    def param_groups(self) -> list[ParamGroup]:
        """Weight decay on everything, as in the authors' code; LARS leaves vectors out by itself."""
        return [ParamGroup(list(trainable(self)))]
