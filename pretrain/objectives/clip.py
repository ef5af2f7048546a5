"""Contrastive image-text pretraining: an image should be nearest to its own caption, and the other way round.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020
§2.3, figure 3), and with `loss: sigmoid` Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training"
(arXiv:2303.15343, algorithm 1).

    i, t    = unit(project(image tower)), unit(text tower)            over the global batch of N pairs
    softmax : mean over pairs of  -log softmax_row(s i t')_nn - log softmax_column(s i t')_nn, halved
    sigmoid : mean over images of the sum over texts of log(1 + exp(-z (s i t' + b))), z = 1 for its own or -1

s = exp(logit_scale) is learnt, between 1 and 100. A rank compares its n images with all N texts in tiles, so
the N x N matrix is never held: memory is O(chunk x chunk), or O(n x N) with `chunk: null`. The sums over
images, which each text needs, are then added up over ranks.

A plain ViT with a class token starts as open_clip's VisionTransformer, and so does the text tower. Other
encoders (ResNets, attention pooling as SigLIP's) are timm's in open_clip too, and start as timm draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from data_pipeline.types import Batch, RandomResizedCrop, ViewSpec
from pretrain import collectives, encoders
from pretrain.clock import Progress
from pretrain.encoders import vit
from pretrain.encoders.text import TextConfig, TextTower
from pretrain.losses import contrastive
from pretrain.objective import (
    BuildContext,
    Embeddings,
    LossOutput,
    ObjectiveConfig,
    ParamGroup,
    Update,
    WholeBatchObjective,
)
from pretrain.optimizers import groups_without_decay
from pretrain.parts import collapse
from pretrain.parts.batch_norm import Spelled, convert, parse, require_independent_parts
from pretrain.parts.precision import autocast

MAX_LOG_SCALE, MIN_LOG_SCALE = math.log(100), 0.0
"""Bounds of the learnt log scale: the paper's (arXiv:2103.00020 §2.5), and open_clip's (train.py)."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics that OpenAI's CLIP and open_clip normalise with (open_clip constants.py)."""


class CLIPConfig(ObjectiveConfig):
    """Defaults are CLIP's; with `loss: sigmoid` scale and bias start where SigLIP's do."""

    needs: ClassVar[frozenset[str]] = frozenset({"views", "tokens"})

    name: str = "clip"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    width: int = pydantic.Field(512, gt=0)  # of the shared embedding
    projection: bool = True  # a linear layer behind the image tower; false: its feature is the embedding
    text: TextConfig = TextConfig()
    start_scale: float | None = pydantic.Field(None, ge=1, le=100)  # None: 1/0.07 for softmax, 10 for sigmoid
    start_bias: float = -10.0  # sigmoid only
    chunk: int | None = pydantic.Field(4096, gt=0)  # images and texts compared at a time; None: all
    batch_norm: Spelled = "rank"  # in the image tower: rank (each its own statistics), sync, grouped:N
    crop_scale: tuple[float, float] = (0.9, 1.0)
    flip: float = pydantic.Field(0.0, ge=0, le=1)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def views(self, image_size: tuple[int, int]) -> Sequence[ViewSpec]:
        crop = RandomResizedCrop(scale=self.crop_scale)
        return [ViewSpec(image_size, crop, flip=self.flip, mean=self.mean, std=self.std)]

    def compared(self, batch_size: int) -> Mapping[str, int]:
        return {"train.batch_size": batch_size}

    def build(self, context: BuildContext) -> CLIP:
        """Raises `ConfigError` where batch norm and micro-batches, or tokenizer and tower, don't fit."""
        micro_batch_size, accumulation = context.micro_batch_size, context.accumulation
        require_independent_parts(self.batch_norm, context.encoder, micro_batch_size, accumulation)
        _require_fitting(self.text, context)
        feature = encoders.width(context.encoder)
        if not self.projection and feature != self.width:
            raise ConfigError(
                f"objective.width: found {self.width}, without a projection it must be the {feature} numbers "
                "of the encoder's feature; set that, or objective.projection=true"
            )
        return CLIP(self, context)


def _require_fitting(text: TextConfig, context: BuildContext) -> None:
    found, length = context.vocabulary, context.text_length
    if found is not None and found != text.vocabulary:
        raise ConfigError(
            f"objective.text.vocabulary: found {text.vocabulary}, data.tokenizer knows {found} tokens; "
            f"set objective.text.vocabulary={found}, or another tokenizer"
        )
    if length is not None and length > text.context:
        raise ConfigError(
            f"objective.text.context: found {text.context}, data.tokenizer gives texts of {length} tokens; "
            "make the first at least as large"
        )


class CLIP(WholeBatchObjective):
    """Two towers, a linear projection of the image's feature, and the scale of their dot products."""

    def __init__(self, config: CLIPConfig, context: BuildContext) -> None:
        super().__init__()
        self.config, self.autocast_dtype = config, context.autocast
        self.micro_batch_size = context.micro_batch_size
        self.encoder = convert(context.encoder, *parse(config.batch_norm))
        if encoders.is_vit(self.encoder) and vit.is_laid_out_as_open_clips(self.encoder):
            vit.initialise_as_open_clip(self.encoder)
        self.image_projection: nn.Module = nn.Identity()
        if config.projection:
            feature = encoders.width(self.encoder)
            self.image_projection = projection = nn.Linear(feature, config.width, bias=False)
            nn.init.normal_(projection.weight, std=feature**-0.5)
        self.text = TextTower(config.text, config.width)
        default = 1 / 0.07 if config.loss == "softmax" else 10.0
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.start_scale or default)]))
        if config.loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor([config.start_bias]))

    def embed(self, batch: Batch) -> Embeddings:
        """((B, D) images, (B, D) texts), float32 of unit length."""
        assert batch.tokens is not None
        return self.embed_images(batch.views[0]), self.embed_texts(batch.tokens)

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised float32 -> (B, D) float32 of unit length."""
        with autocast(images.device, self.autocast_dtype):
            projected = self.image_projection(encoders.features(self.encoder, images))
        return functional.normalize(projected.float(), dim=1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, D) float32 of unit length."""
        with autocast(tokens.device, self.autocast_dtype):
            projected = self.text(tokens)
        return functional.normalize(projected.float(), dim=1)

    def loss(self, embeddings: Embeddings, progress: Progress) -> LossOutput:
        images, texts = embeddings
        all_texts = collectives.gather(texts)
        first = collectives.rank() * len(images)
        scale, chunk = self.logit_scale.float().exp(), self.config.chunk or len(all_texts)
        if self.config.loss == "sigmoid":
            loss = contrastive.sigmoid_pairs(images, all_texts, scale, self.logit_bias, first, chunk)
        else:
            over_texts, over_own_images = contrastive.log_sums(images, all_texts, scale, chunk)
            over_images = collectives.log_total(over_own_images)[first : first + len(texts)]
            positive = scale * (images * texts).sum(dim=1)
            loss = ((over_texts - positive).mean() + (over_images - positive).mean()) / 2
        return LossOutput(loss, self._metrics(images, all_texts, first))

    @torch.no_grad()
    def _metrics(self, images: Tensor, all_texts: Tensor, first: int) -> dict[str, Tensor]:
        """What shows a collapse; the pairs' figures over at most 256 of this rank's."""
        texts = all_texts[first : first + len(images)]
        found = collapse.spread(images)
        found |= {f"text_{name}": value for name, value in collapse.spread(texts).items()}
        found |= collapse.pairs(images[:256] @ texts[:256].T)
        found["logit_scale"] = self.logit_scale[0].detach().float().exp()
        if self.config.loss == "sigmoid":
            found["logit_bias"] = self.logit_bias[0].detach().float()
        return found

    def after_step(self, update: Update, progress: Progress, output: LossOutput) -> None:
        """Bound the scale through the engine: the fp32 master would undo a clamp of the working copy."""
        update.clamp(self.logit_scale, MAX_LOG_SCALE, MIN_LOG_SCALE)

    def param_groups(self) -> list[ParamGroup]:
        """No decay of gains, biases, the class token, the logit scale and its bias: open_clip's vectors.

        Its rule is `p.ndim < 2` (open_clip_train/main.py), and its class token is a vector where timm's is
        (1, 1, D). Positions are matrices there, and decay.
        """
        return groups_without_decay(self, lambda name, p: p.ndim < 2 or name.endswith("cls_token"))
