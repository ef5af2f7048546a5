"""Contrastive image-text pretraining: an image should be nearest to its own caption, and the other way round.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020
§2.3, figure 3), and with `loss: sigmoid` Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training"
(arXiv:2303.15343, algorithm 1).

    i, t    = unit(project(image tower)), unit(text tower)            over the global batch of N pairs
    softmax : mean over pairs of  -log softmax_row(s i t')_nn - log softmax_column(s i t')_nn, halved
    sigmoid : mean over images of the sum over texts of log(1 + exp(-z (s i t' + b))), z = 1 for its own, else -1

s = exp(logit_scale) is learnt, at most 100. Each rank compares its images with all texts in chunks, so the
N x N matrix is never held; the sums over images for each text are then combined over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from data_pipeline.types import Batch, RandomResizedCrop, ViewSpec
from pretrain import collectives, encoders, losses
from pretrain.batch_norm import convert, has_batch_norm, parse
from pretrain.encoders.text import TextConfig, TextTower
from pretrain.optimizers import groups_without_decay
from pretrain.precision import autocast
from pretrain.types import (
    BuildContext,
    Embeddings,
    LossOutput,
    ObjectiveConfig,
    ParamGroup,
    Progress,
    Update,
    WholeBatchObjective,
)

MAX_SCALE = math.log(100)
"""Upper bound of the learnt log scale (arXiv:2103.00020 §2.5)."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics that OpenAI's CLIP and open_clip normalise with (open_clip constants.py)."""


class CLIPConfig(ObjectiveConfig):
    """Defaults are CLIP's; for SigLIP set `loss: sigmoid`, whose starting values are then its own."""

    needs: ClassVar[frozenset[str]] = frozenset({"views", "tokens"})

    name: str = "clip"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    width: int = pydantic.Field(512, gt=0)  # of the shared embedding
    text: TextConfig = TextConfig()
    start_scale: float | None = None  # of the logits; None: 1/0.07 for softmax, 10 for sigmoid
    start_bias: float = -10.0  # sigmoid only
    chunk: int = pydantic.Field(4096, gt=0)  # texts compared at a time
    crop_scale: tuple[float, float] = (0.9, 1.0)
    flip: float = pydantic.Field(0.0, ge=0, le=1)
    batch_norm: str = "shuffle"  # in the image tower: shuffle (per rank), sync, grouped:N
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @pydantic.field_validator("batch_norm")
    @classmethod
    def _spelling(cls, text: str) -> str:
        parse(text)
        return text

    def views(self, image_size: tuple[int, int]) -> Sequence[ViewSpec]:
        crop = RandomResizedCrop(scale=self.crop_scale)
        return [ViewSpec(image_size, crop, flip=self.flip, mean=self.mean, std=self.std)]

    def build(self, context: BuildContext) -> CLIP:
        kind, size = parse(self.batch_norm)
        if context.accumulation > 1 and has_batch_norm(context.encoder) and kind != "grouped":
            raise ConfigError(
                "train.micro_batch_size: the loss is over the whole batch, whose micro-batches batch norm may not "
                "mix up; set objective.batch_norm=grouped:N, or no micro-batches"
            )
        if kind == "grouped" and context.micro_batch_size % size:
            raise ConfigError(
                f"objective.batch_norm: found grouped:{size}, which must divide the micro-batch of "
                f"{context.micro_batch_size}"
            )
        return CLIP(self, context)


class CLIP(WholeBatchObjective):
    """Two towers, a linear projection of the image's feature, and the scale of their dot products."""

    def __init__(self, config: CLIPConfig, context: BuildContext) -> None:
        super().__init__()
        self.config, self.autocast_dtype = config, context.autocast
        self.micro_batch_size = context.micro_batch_size
        self.encoder = convert(context.encoder, *parse(config.batch_norm))
        self.image_projection = nn.Linear(encoders.width(self.encoder), config.width, bias=False)
        nn.init.normal_(self.image_projection.weight, std=encoders.width(self.encoder) ** -0.5)
        self.text = TextTower(config.text, config.width)
        default = 1 / 0.07 if config.loss == "softmax" else 10.0
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.start_scale or default)]))
        if config.loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor([config.start_bias]))

    def embed(self, batch: Batch) -> Embeddings:
        """((B, D) images, (B, D) texts), float32 of unit length."""
        assert batch.tokens is not None
        images = batch.views[0]
        with autocast(images.device, self.autocast_dtype):
            image = self.image_projection(encoders.features(self.encoder, images))
            text = self.text(batch.tokens)
        return functional.normalize(image.float(), dim=1), functional.normalize(text.float(), dim=1)

    def loss(self, embeddings: Embeddings, progress: Progress) -> LossOutput:
        images, texts = embeddings
        all_texts = collectives.gather(texts)
        first = collectives.rank() * len(images)
        scale = self.logit_scale.float().exp()
        if self.config.loss == "sigmoid":
            loss = losses.sigmoid_pairs(images, all_texts, scale, self.logit_bias, first, self.config.chunk)
        else:
            loss = self._softmax(images, texts, all_texts, scale, first)
        return LossOutput(loss, self._metrics(images, texts, all_texts, scale, first))

    def _softmax(self, images: Tensor, texts: Tensor, all_texts: Tensor, scale: Tensor, first: int) -> Tensor:
        over_texts, over_own_images = losses.log_sums(images, all_texts, scale, self.config.chunk)
        over_images = collectives.gather(over_own_images[None]).logsumexp(dim=0)[first : first + len(texts)]
        positive = scale * (images * texts).sum(dim=1)
        return ((over_texts - positive).mean() + (over_images - positive).mean()) / 2

    @torch.no_grad()
    def _metrics(
        self, images: Tensor, texts: Tensor, all_texts: Tensor, scale: Tensor, first: int
    ) -> dict[str, Tensor]:
        """Collapse shows in these; of at most 256 of this rank's pairs against as many texts."""
        few = min(len(images), 256)
        similarity = images[:few] @ all_texts[first : first + few].T
        own = similarity.diagonal()
        others = (similarity.sum() - own.sum()) / max(few * few - few, 1)
        found = {
            "logit_scale": scale[0].detach(),
            "positive_similarity": own.mean(),
            "negative_similarity": others,
            "top1": (similarity.argmax(dim=1) == torch.arange(few, device=images.device)).float().mean()
            * 100,
            "embedding_std": images.std(dim=0).mean() if len(images) > 1 else images.new_zeros(()),
            "text_embedding_std": texts.std(dim=0).mean() if len(texts) > 1 else texts.new_zeros(()),
        }
        if self.config.loss == "sigmoid":
            found["logit_bias"] = self.logit_bias[0].detach()
        return found

    def after_step(self, update: Update, progress: Progress) -> None:
        """Clamp the scale through the engine: a clamp of the working copy alone is undone by its fp32 master."""
        update.clamp(self.logit_scale, MAX_SCALE)

    def param_groups(self) -> list[ParamGroup]:
        """No decay of gains, biases, the logit scale and its bias, as open_clip has it."""
        return groups_without_decay(self, lambda name, p: p.ndim < 2)
