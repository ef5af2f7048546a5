"""The one door to timm for training: an encoder *is* a timm model, with timm's parameter names."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.loading import Config
from pretrain.encoders.torchvision_compat import ensure_torchvision

Pooling = Literal["token", "avg"]
_FILES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt"})


class EncoderConfig(Config):
    """A timm architecture and the arguments it is made with."""

    name: str  # any name of timm.list_models()
    args: dict[str, Any] = pydantic.Field(
        default_factory=dict
    )  # passed to timm.create_model, recorded in the export
    pooling: Pooling = "token"  # how a ViT's tokens become one feature: class token, or mean of the patches
    crop: float = pydantic.Field(0.875, gt=0, le=1)  # kept of the shorter side when evaluated, exported
    weights: str | None = None  # what a new run starts from, see `encoders.weights`; None: random weights

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        timm = _timm()
        if timm.is_model(name):
            return name
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            "not an architecture of the installed timm " + timm.__version__
            + (f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models()")
        )  # fmt: skip

    def placed(self) -> EncoderConfig:
        """The same with an absolute path to weights, also to those that are gone by now."""
        path = Path(self.weights or "").expanduser()
        if self.weights is not None and self.weights.startswith("local-dir:"):
            path = Path(self.weights.removeprefix("local-dir:")).expanduser()
            return self.model_copy(update={"weights": f"local-dir:{path.absolute()}"})
        if (
            self.weights is None
            or self.weights.startswith(("hf-hub:", "hf_hub:"))
            or not (path.exists() or len(path.parts) > 1 or path.suffix in _FILES)
        ):
            return self
        return self.model_copy(update={"weights": str(path.absolute())})


def build(config: EncoderConfig, image_size: tuple[int, int]) -> nn.Module:
    """A randomly initialised encoder without a classifier: (B, 3, H, W) float32 in, (B, D) out.

    Raises `ConfigError` where timm refuses the arguments.
    """
    arguments = dict(config.args)
    if has_image_size(config.name):
        arguments.setdefault("img_size", tuple(image_size))
    try:
        model = _timm().create_model(config.name, pretrained=False, num_classes=0, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"encoder.args: timm can't make {config.name} with {arguments}: {' '.join(str(error).split())}"
        ) from error
    assert isinstance(model, nn.Module)
    _require_whole_patches(model, image_size)
    return model


def _require_whole_patches(model: Any, image_size: tuple[int, int]) -> None:
    """timm drops the pixels beyond the last whole patch without a word."""
    if not is_vit(model) or getattr(model.patch_embed, "dynamic_img_pad", False):
        return
    patch = model.patch_embed.patch_size
    if any(side % part for side, part in zip(image_size, patch, strict=True)):
        raise ConfigError(
            f"data.image_size: {image_size[0]} x {image_size[1]} pixels aren't whole patches of "
            f"{patch[0]} x {patch[1]}; use a multiple"
        )


def has_image_size(name: str) -> bool:
    """Whether the architecture is made for one image size, as ViTs are and ResNets aren't."""
    return bool(_timm().get_pretrained_cfg(name).fixed_input_size) or name.startswith("vit_")


def is_vit(encoder: nn.Module) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(encoder, VisionTransformer)


def features(encoder: nn.Module, images: Tensor, pooling: Pooling = "token") -> Tensor:
    """(B, 3, H, W) normalised float32 -> (B, D) frozen-feature vectors, as an export gives them."""
    if pooling == "avg" and is_vit(encoder):
        tokens = encoder.forward_features(images)  # type: ignore[operator]
        return tokens[:, encoder.num_prefix_tokens :].mean(dim=1)  # type: ignore[no-any-return]
    if not is_vit(encoder):  # convolutions are quicker so, on a CPU twice as quick; the numbers are the same
        images = images.contiguous(memory_format=torch.channels_last)
    return encoder(images)  # type: ignore[no-any-return]


def _timm() -> Any:
    ensure_torchvision()
    import timm

    return timm


def width(encoder: nn.Module) -> int:
    """Size of the feature vector."""
    found = encoder.num_features
    assert isinstance(found, int)
    return found


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
