"""A causal text transformer, laid out as open_clip's so that weights go over under their own names.

Radford et al. 2021 (arXiv:2103.00020 §2.4): pre-norm blocks, learnt positions, causal attention, the feature
is the token at the end of the text (EOT), which is the highest number in every text. Initialisation as in
open_clip's transformer.py and OpenAI's model.py.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.loading import Config

Activation = Literal["gelu", "quick_gelu"]


class TextConfig(Config):
    """Defaults are CLIP's for ViT-B (63 M parameters, vocabulary of OpenAI's BPE)."""

    vocabulary: int = pydantic.Field(49_408, gt=2)
    context: int = pydantic.Field(77, gt=1)  # tokens a text is cut or padded to
    width: int = pydantic.Field(512, gt=0)
    depth: int = pydantic.Field(12, gt=0)
    heads: int = pydantic.Field(8, gt=0)
    activation: Activation = "gelu"  # quick_gelu: OpenAI's, and open_clip's "-quickgelu" networks

    @pydantic.model_validator(mode="after")
    def _divides(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}")
        return self


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation (openai/CLIP model.py); up to .02 off the exact GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a residual path."""

    def __init__(self, width: int, heads: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        gelu = nn.GELU() if activation == "gelu" else QuickGELU()
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=gelu, c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class _Stack(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, activation: Activation) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, activation) for _ in range(depth))


class TextTower(nn.Module):
    """(B, L) int64 tokens -> (B, embedding) float: the projected feature of each text's EOT token."""

    attn_mask: Tensor

    def __init__(self, config: TextConfig, embedding: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, width))
        self.transformer = _Stack(width, config.depth, config.heads, config.activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embedding))
        mask = torch.full((config.context, config.context), float("-inf")).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        width, depth = self.config.width, self.config.depth
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, ResidualBlock)
            into, out = block.mlp.c_fc, block.mlp.c_proj
            assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(into.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.config.context:
            raise ConfigError(
                f"objective.text.context: found texts of {tokens.shape[1]} tokens, "
                f"the tower takes {self.config.context}"
            )
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = self.attn_mask[:length, :length]
        for block in self.transformer.resblocks:
            x = block(x, mask)
        x = self.ln_final(x)
        at_end: Tensor = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
        return at_end @ self.text_projection
