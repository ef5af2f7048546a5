"""What objectives need of a timm VisionTransformer beyond its forward: patches, positions, visible tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from pretrain.encoders.torchvision_compat import ensure_torchvision

ensure_torchvision()

from timm.layers import PatchEmbed  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402


def not_plain(encoder: nn.Module) -> str | None:
    """What keeps an encoder from being a ViT whose patches are one layer's, in a fixed grid."""
    if not isinstance(encoder, VisionTransformer):
        return f"this is {type(encoder).__name__}"
    if type(encoder.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(encoder.patch_embed).__name__}"
    if encoder.pos_embed is None:
        return "it has no table of positions (encoder.args.pos_embed)"
    if encoder.patch_embed.dynamic_img_pad:
        return "its images are padded (encoder.args.dynamic_img_pad)"
    return None


def grid_and_patch(encoder: VisionTransformer) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of patches and (height, width) of a patch in pixels."""
    grid, patch = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size
    return (int(grid[0]), int(grid[1])), (int(patch[0]), int(patch[1]))


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, L, ph*pw*C): patches in row order, pixels in row order, channels last."""
    batch, channels, height, width = images.shape
    ph, pw = patch
    rows, columns = height // ph, width // pw
    cut = images.reshape(batch, channels, rows, ph, columns, pw)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, ph * pw * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """(B, L, ph*pw*C) -> (B, C, H, W): the inverse of `patchify`."""
    (rows, columns), (ph, pw) = grid, patch
    channels = patches.shape[-1] // (ph * pw)
    cut = patches.reshape(len(patches), rows, columns, ph, pw, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, rows * ph, columns * pw)


def sincos_positions(width: int, grid: tuple[int, int], prefix: int) -> Tensor:
    """(1, prefix + rows*columns, width) float32: fixed 2-D sine-cosine positions, zero for prefix tokens.

    MoCo v3 and MAE (arXiv:2104.02057 §4, arXiv:2111.06377 appendix A.1). The first half of the channels codes
    the column and the second the row, each as sines then cosines of position / 10000^(i / (width/4)),
    in the layout of the official MAE code. Computed in float64.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, not {width}")
    rows, columns = grid
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def code(position: Tensor) -> Tensor:
        angle = position.double().reshape(-1, 1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    patches = torch.cat([code(column), code(row)], dim=1)
    return torch.cat([torch.zeros(prefix, width, dtype=torch.float64), patches]).float().unsqueeze(0)


def fix_positions(encoder: VisionTransformer) -> None:
    """Replace the learnt positions by fixed sine-cosine ones, in place. Raises `ConfigError`."""
    if encoder.embed_dim % 4:
        raise ConfigError(
            f"encoder.args.embed_dim: found {encoder.embed_dim}; fixed 2-D positions need a width divisible "
            f"by 4"
        )
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    grid, _ = grid_and_patch(encoder)
    with torch.no_grad():
        encoder.pos_embed.copy_(sincos_positions(encoder.embed_dim, grid, prefix))
    encoder.pos_embed.requires_grad_(False)


def encode_visible(encoder: VisionTransformer, images: Tensor, visible: Tensor) -> Tensor:
    """Tokens of the `visible` patches only: (B, 3, H, W), (B, K) int64 -> (B, prefix + K, D).

    Positions are added before the others are dropped, so a token knows where it came from.
    """
    tokens = encoder._pos_embed(encoder.patch_embed(images))
    prefix = encoder.num_prefix_tokens
    patches = take(tokens[:, prefix:], visible)
    kept = encoder.norm_pre(torch.cat([tokens[:, :prefix], patches], dim=1))
    return encoder.norm(encoder.blocks(kept))  # type: ignore[no-any-return]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by number: (B, L, D), (B, K) int64 -> (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def transformer_blocks(width: int, depth: int, heads: int, norm_eps: float = 1e-6) -> nn.Sequential:
    """A stack of timm's own pre-norm blocks, for decoders and towers."""
    norm = partial(nn.LayerNorm, eps=norm_eps)
    return nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))


def initialise_as_mae(modules: Iterable[nn.Module]) -> None:
    """Xavier-uniform linear layers with zero bias, unit layer norms (`_init_weights` of the MAE code)."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def is_laid_out_as_open_clips(encoder: VisionTransformer) -> bool:
    """Whether it is a tower such as open_clip makes itself: linear patches, plain blocks, a class token."""
    pools_by_class = encoder.cls_token is not None and encoder.global_pool == "token"
    plain = type(encoder.patch_embed) is PatchEmbed and all(type(block) is Block for block in encoder.blocks)
    return pools_by_class and encoder.attn_pool is None and plain


def initialise_as_open_clip(encoder: VisionTransformer) -> None:
    """Torch's own defaults, class token and positions of deviation width^-.5, in place.

    As open_clip's `VisionTransformer` draws it (transformer.py), where timm draws all from deviation .02. A
    bias of the patch projection, which open_clip has none of, starts at zero.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    scale = encoder.embed_dim**-0.5
    for block in encoder.blocks:
        attention = block.attn
        nn.init.xavier_uniform_(attention.qkv.weight)  # of all three at once, as nn.MultiheadAttention
        for bias in (attention.qkv.bias, attention.proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
    if encoder.patch_embed.proj.bias is not None:
        nn.init.zeros_(encoder.patch_embed.proj.bias)
    for table in (encoder.cls_token, encoder.pos_embed):
        if table is not None:
            nn.init.normal_(table, std=scale)


def initialise_as_moco_v3(encoder: VisionTransformer) -> None:
    """Xavier-uniform as for separate query, key and value matrices (MoCo v3's vits.py), in place.

    The patch projection counts as the linear layer it is; class token close to zero.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            outputs = module.out_features // 3 if name.endswith("qkv") else module.out_features
            bound = math.sqrt(6 / (module.in_features + outputs))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = encoder.patch_embed.proj
    inputs = projection.weight[0].numel()
    bound = math.sqrt(6 / (inputs + encoder.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    if encoder.cls_token is not None:
        nn.init.normal_(encoder.cls_token, std=1e-6)
