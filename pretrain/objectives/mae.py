"""Masked autoencoder: hide most patches, let the encoder see the rest, rebuild the hidden ones.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377); where the paper is
silent, the authors' code (facebookresearch/mae) decides: initialisation, weight-decay groups, unbiased
variance of the target.

    visible = a random quarter of the patches           z = encoder(visible)
    tokens  = z at visible places, one learnt token elsewhere, + positions
    loss    = mean over hidden patches of || decoder(tokens) - normalised pixels ||^2

Departures: the mask is drawn from each sample's own seed, so it doesn't depend on how a batch is cut; images
need not be square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import pydantic
import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from data_pipeline.augment import denormalised
from data_pipeline.randomness import uniform
from data_pipeline.types import Batch, RandomResizedCrop, ViewSpec
from pretrain.clock import Progress
from pretrain.encoders import vit
from pretrain.losses import reconstruction
from pretrain.objective import BuildContext, LossOutput, Objective, ObjectiveConfig, ParamGroup
from pretrain.optimizers import without_decay_on_vectors
from pretrain.parts.precision import autocast

MASK = 1000
"""Purpose number of the mask among all that is drawn from a sample's seed."""


class MAEConfig(ObjectiveConfig):
    """Defaults are the paper's (table 1 and appendix A.1)."""

    needs: ClassVar[frozenset[str]] = frozenset({"views"})

    name: str = "mae"
    mask_ratio: float = pydantic.Field(0.75, gt=0, lt=1)
    normalise_pixels: bool = True  # predict patches normalised by their own mean and variance
    decoder_width: int = pydantic.Field(512, gt=0)
    decoder_depth: int = pydantic.Field(8, gt=0)
    decoder_heads: int = pydantic.Field(16, gt=0)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: float = pydantic.Field(0.5, ge=0, le=1)

    def views(self, image_size: tuple[int, int]) -> Sequence[ViewSpec]:
        return [ViewSpec(size=image_size, crop=RandomResizedCrop(scale=self.crop_scale), flip=self.flip)]

    def build(self, context: BuildContext) -> MAE:
        _require_usable(context.encoder)
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ConfigError(
                f"objective.decoder_width: found {self.decoder_width}; "
                f"must be divisible by 4 and by decoder_heads ({self.decoder_heads})"
            )
        return MAE(self, context)


def _require_usable(encoder: Any) -> None:
    """Raises `ConfigError` where patches can't be hidden, or the feature wouldn't be trained."""
    why, hint = vit.not_plain(encoder), "use one such as vit_base_patch16_224"
    if why is None and encoder.attn_pool is not None:
        why = "its attention pooling (global_pool map) is behind the tokens that are trained"
        hint = "set encoder.pooling=avg"
    elif why is None and not isinstance(encoder.norm, nn.LayerNorm):
        why = "it has no layer norm behind its last block"
        hint = "set encoder.pooling=avg in place of encoder.args.global_pool, or use another ViT"
    elif why is None and not isinstance(encoder.patch_drop, nn.Identity):
        why, hint = "encoder.args.patch_drop_rate hides patches a second time", "leave it out"
    if why is not None:
        raise ConfigError(
            f"encoder.name: mae needs a plain VisionTransformer with a final norm, and {why}; {hint}"
        )


class Reconstruction(NamedTuple):
    """What one forward pass makes of a batch of B images cut into L patches of P values."""

    predicted: Tensor  # (B, L, P) float32
    target: Tensor  # (B, L, P) float32
    masked: Tensor  # (B, L) bool


class MAE(Objective):
    """The encoder is a plain timm ViT; the decoder is thrown away after pretraining."""

    def __init__(self, config: MAEConfig, context: BuildContext) -> None:
        super().__init__()
        self.config, self.autocast_dtype = config, context.autocast
        encoder: Any = context.encoder
        self.encoder = encoder
        self.grid, self.patch = vit.grid_and_patch(encoder)
        patches = self.grid[0] * self.grid[1]
        self.visible_count = int(patches * (1 - config.mask_ratio))
        if not 0 < self.visible_count < patches:
            raise ConfigError(
                f"objective.mask_ratio: {config.mask_ratio} of {patches} patches leaves {self.visible_count} "
                "visible; at least one must be visible and one hidden"
            )
        self.channels = int(encoder.patch_embed.proj.in_channels)
        width = config.decoder_width
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = vit.transformer_blocks(width, config.decoder_depth, config.decoder_heads)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_predict = nn.Linear(width, self.patch[0] * self.patch[1] * self.channels)
        positions = vit.sincos_positions(width, self.grid, prefix=encoder.num_prefix_tokens)
        self.decoder_positions: Tensor
        self.register_buffer("decoder_positions", positions, persistent=False)
        self._initialise(encoder)

    def _initialise(self, encoder: Any) -> None:
        vit.initialise_as_mae(self.modules())
        vit.fix_positions(encoder)
        projection = encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1))
        for token in (encoder.cls_token, encoder.reg_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        predicted, target, masked = self.reconstruct(batch)
        return LossOutput(reconstruction.masked_patch_loss(predicted, target, masked), {})

    def reconstruct(self, batch: Batch) -> Reconstruction:
        images = batch.views[0]
        order = self.mask_order(batch.seeds)
        visible = order[:, : self.visible_count]
        with autocast(images.device, self.autocast_dtype):
            encoded = vit.encode_visible(self.encoder, images, visible)
            predicted = self.decode(encoded, order).float()
        target = vit.patchify(images.float(), self.patch)
        if self.config.normalise_pixels:
            target = reconstruction.normalise_patches(target)
        masked = torch.ones(order.shape, dtype=torch.bool, device=order.device).scatter_(1, visible, False)
        return Reconstruction(predicted, target, masked)

    def mask_order(self, seeds: Tensor) -> Tensor:
        """A random order of the patches for each sample, visible ones first: (B,) int64 -> (B, L) int64."""
        noise = uniform(seeds, MASK, self.grid[0] * self.grid[1])
        return noise.argsort(dim=1, stable=True)

    def decode(self, encoded: Tensor, order: Tensor) -> Tensor:
        """(B, prefix + visible, D) -> (B, L, P): fill in mask tokens, undo the order, predict every patch."""
        tokens = self.decoder_embed(encoded)
        prefix = tokens.shape[1] - self.visible_count
        hidden = self.mask_token.expand(len(tokens), order.shape[1] - self.visible_count, -1).to(tokens.dtype)
        shuffled = torch.cat([tokens[:, prefix:], hidden], dim=1)
        restored = vit.take(shuffled, order.argsort(dim=1))
        tokens = torch.cat([tokens[:, :prefix], restored], dim=1) + self.decoder_positions
        tokens = self.decoder_norm(self.decoder_blocks(tokens))
        predicted: Tensor = self.decoder_predict(tokens)
        return predicted[:, prefix:]

    def param_groups(self) -> list[ParamGroup]:
        return without_decay_on_vectors(self)

    @torch.no_grad()
    def judge(self, batch: Batch) -> Mapping[str, Tensor]:
        """Error on hidden patches, against the best guess that knows nothing: the mean patch of the batch."""
        predicted, target, masked = self.reconstruct(batch)
        mean_patch = target.mean(dim=(0, 1), keepdim=True).expand_as(target)
        return {
            "reconstruction_error": reconstruction.masked_patch_loss(predicted, target, masked),
            "mean_patch_error": reconstruction.masked_patch_loss(mean_patch, target, masked),
        }

    @torch.no_grad()
    def pictures(self, batch: Batch) -> Mapping[str, Tensor]:
        """A strip of original | masked | rebuilt for each image, at most eight, under each other."""
        batch = next(batch.split(8))
        images = batch.views[0].float()
        predicted, _, masked = self.reconstruct(batch)
        patches = vit.patchify(images, self.patch)
        if self.config.normalise_pixels:
            mean, deviation = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            predicted = predicted * deviation + mean
        hidden = masked.unsqueeze(-1)
        rows = [patches, patches.masked_fill(hidden, 0.0), torch.where(hidden, predicted, patches)]
        strips = torch.cat([vit.unpatchify(row, self.grid, self.patch) for row in rows], dim=3)
        sheet = torch.cat(list(strips), dim=1)
        spec = replace(self.config.views((1, 1))[0], grey=self.channels == 1)
        return {"reconstructions": denormalised(sheet, spec)}
