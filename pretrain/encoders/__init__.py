"""The one door to timm for training: an encoder *is* a timm model, with timm's parameter names.

It pools as it was told when it was made, so its output is the feature that training, evaluation and export
share.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.loading import Config
from pretrain.encoders import look, registered
from pretrain.encoders.torchvision_compat import ensure_torchvision

log = logging.getLogger(__name__)

Pooling = Literal["token", "avg"]
_FILES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt"})
_WIDTH = "feature_width"
"""Attribute of an encoder: numbers of its feature."""


class EncoderConfig(Config):
    """A timm architecture and the arguments it is made with."""

    imports: tuple[str, ...] = ()  # modules that register architectures of your own with timm
    name: str  # any name of timm.list_models(), or of one that `imports` register
    args: dict[str, Any] = pydantic.Field(
        default_factory=dict
    )  # passed to timm.create_model, recorded in the export
    # How a ViT's tokens become one feature. avg: the mean of its patches behind the last norm; token: as timm
    # makes it, which is the class token unless the architecture or `args.global_pool` says otherwise.
    pooling: Pooling = "token"
    crop: float = pydantic.Field(0.875, gt=0, le=1)  # kept of the shorter side when evaluated, exported
    weights: str | None = None  # what a new run starts from, see `encoders.weights`; None: random weights
    weights_size: int | tuple[int, int] | None = None  # of their images, where a file's grid isn't square

    @pydantic.field_validator("imports")
    @classmethod
    def _importable(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        registered.bring(modules)
        return modules

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        registered.require_known(name)
        return name

    @property
    def channels(self) -> int:
        """3, or 1 where it is shown grey pictures."""
        found = self.args.get("in_chans", 3)
        return found if isinstance(found, int) else 3

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
    """A randomly initialised encoder without a classifier: (B, channels, H, W) float32 in, (B, D) out.

    Raises `ConfigError` where timm refuses the arguments, or the architecture can't see such images whole or
    makes something else of them than one vector.
    """
    if config.args.get("in_chans", 3) not in (1, 3):
        raise ConfigError(
            f"encoder.args.in_chans: found {config.args['in_chans']!r}; allowed: 3 (RGB) or 1 (grey pictures)"
        )
    chosen = arguments(config, image_size)
    model = _make(config.name, chosen)
    _require_pooling(config, model)
    setattr(model, _WIDTH, _looked(config, chosen, image_size).width)
    return model


def arguments(config: EncoderConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """All that timm makes the encoder with, as it is trained, evaluated and exported."""
    chosen = dict(config.args)
    if has_image_size(config.name):
        chosen.setdefault("img_size", tuple(image_size))
    if config.pooling == "avg" and _is_plain(config.name, _frozen(chosen)):
        wanted = {"global_pool": "avg", "fc_norm": False}
        said = {name: chosen[name] for name in wanted if name in chosen}
        if said not in ({}, wanted, {"fc_norm": False}):
            raise ConfigError(
                "encoder.pooling: avg is the mean of a ViT's patches behind its last norm, and encoder.args "
                f"say {said}; leave out one of them"
            )
        # fc_norm=False keeps the norm in front of the mean; timm alone would move it behind.
        chosen |= wanted
    return chosen


def _make(name: str, chosen: Mapping[str, Any]) -> nn.Module:
    try:
        model = _timm().create_model(name, pretrained=False, num_classes=0, **chosen)
    except Exception as error:  # timm and an architecture of one's own raise whatever they like
        raise ConfigError(
            f"encoder.args: timm can't make {name} with {dict(chosen)}: {_line(error)}"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _require_pooling(config: EncoderConfig, model: nn.Module) -> None:
    """`pooling: avg` has to be what the encoder does, be it because it always does."""
    if config.pooling == "token" or own_pooling(model) == "avg":
        return
    raise ConfigError(
        f"encoder.pooling: avg is for plain ViTs and what pools by the mean anyway; {config.name} pools by "
        f"{own_pooling(model) or 'a way of its own'}: leave it out, or see whether "
        f"encoder.args.global_pool=avg works"
    )


def own_pooling(model: Any) -> str | None:
    """timm's word for how a model makes one vector of its map or tokens; None where it doesn't say."""
    if is_vit(model) and not _pools_plainly(type(model)):
        return None
    found = getattr(model, "global_pool", None)
    if found is None or isinstance(found, nn.Identity):
        found = getattr(getattr(model, "head", None), "global_pool", None)
    found = getattr(found, "pool_type", found)
    return found if isinstance(found, str) else None


@lru_cache(256)
def _is_plain(name: str, frozen: str) -> bool:
    """Whether it is a ViT that pools as timm's VisionTransformer does."""
    with torch.device("meta"):
        try:
            model = _make(name, _thawed(frozen))
        except ConfigError:
            return False  # said where it is made
    return is_vit(model) and _pools_plainly(type(model))


def _pools_plainly(kind: type[nn.Module]) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return getattr(kind, "forward_head", None) is VisionTransformer.forward_head


@dataclass(frozen=True)
class _Chosen:
    """What `_seen` remembers its answers by: the function that makes it may be registered anew."""

    entrypoint: Any
    name: str
    frozen: str
    channels: int
    size: tuple[int, int]


def _looked(config: EncoderConfig, chosen: dict[str, Any], size: tuple[int, int]) -> look.Look:
    """Raises `ConfigError`, and where another size would do, says which."""
    key = _Chosen(_entrypoint(config.name), config.name, _frozen(chosen), config.channels, size)
    try:
        found: look.Look | str = _seen(key)
    except Exception as error:
        found = _line(error)
    shown = f"{size[0]} x {size[1]} pixels"
    if isinstance(found, look.Look) and found.given:
        raise ConfigError(
            f"encoder.args: {config.name} with {chosen} makes {found.given} of a picture, not one feature "
            "vector; leave out what asks for maps or tokens (features_only, global_pool: '')"
        )
    if isinstance(found, look.Look) and found.dropped is None:
        return found
    told = "use another size"
    if "img_size" not in config.args:
        dropped = found.dropped if isinstance(found, look.Look) else None
        make = partial(_resized, config.name, _frozen(chosen))
        other = look.multiple(make, config.channels, size, dropped)
        if other is not None:
            told = f"use a multiple of {other[0]}, such as {other[1][0]} x {other[1][1]}"
    if isinstance(found, str):
        raise ConfigError(f"data.image_size: {config.name} can't take {shown}: {found}; {told}")
    assert found.dropped is not None
    (height, width), (high, wide) = found.dropped.map, found.dropped.window
    what = f"{shown} aren't whole patches"
    if (height, width) != size:
        what = f"of {shown} comes an inner map of {height} x {width}, which isn't whole pieces"
    raise ConfigError(
        f"data.image_size: {what} of {high} x {wide}, and {config.name} wouldn't see the rest; {told}"
    )


@lru_cache(256)
def _seen(key: _Chosen) -> look.Look:
    return look.look(partial(_make, key.name, _thawed(key.frozen)), key.channels, key.size)


def _resized(name: str, frozen: str, size: tuple[int, int]) -> nn.Module:
    chosen = _thawed(frozen)
    return _make(name, chosen | ({"img_size": size} if "img_size" in chosen else {}))


_ARGUMENTS: dict[str, dict[str, Any]] = {}


def _frozen(chosen: dict[str, Any]) -> str:
    """A key for `chosen`, which `_thawed` gives back."""
    key = json.dumps(chosen, sort_keys=True, default=repr)
    _ARGUMENTS[key] = chosen
    return key


def _thawed(key: str) -> dict[str, Any]:
    return dict(_ARGUMENTS[key])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def has_image_size(name: str) -> bool:
    """Whether the architecture is made for one image size, as ViTs are and ResNets aren't."""
    known = _timm().get_pretrained_cfg(name)
    return bool(known is not None and known.fixed_input_size) or name.startswith("vit_")


def is_vit(encoder: nn.Module) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(encoder, VisionTransformer)


def features(encoder: nn.Module, images: Tensor) -> Tensor:
    """(B, channels, H, W) normalised float32 -> (B, D): what is trained, judged and exported.

    The encoder pools as `build` made it.
    """
    if not is_vit(encoder) and not (images.is_cpu and _dies_in_channels_last(encoder)):
        # Convolutions are quicker so, on a CPU twice as quick; the numbers are the same.
        images = images.contiguous(memory_format=torch.channels_last)
    return encoder(images)  # type: ignore[no-any-return]


def _dies_in_channels_last(encoder: nn.Module) -> bool:
    """Whether torch's CPU convolutions (oneDNN) write beyond their memory in a backward pass in that order.

    Seen of windows of 1 x 1 with a stride over 2 to 7 channels (torch 2.13; pytorch issue 136348): the
    process is killed, or its memory is damaged. A stem that sees the picture's three channels so has such a
    layer.
    """
    return any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.in_channels // layer.groups < 16
        for layer in encoder.modules()
    )


def width(encoder: nn.Module) -> int:
    """Size of the feature vector; of an encoder that `build` didn't make, what it says itself."""
    found = getattr(encoder, _WIDTH, None) or encoder.num_features
    assert isinstance(found, int)
    return found


def chances(encoder: nn.Module) -> str:
    """What training drops of the encoder by chance, as "drop path (up to 0.1)"; empty where nothing."""
    found: dict[str, float] = {}
    for layer in encoder.modules():
        kind = type(layer).__name__
        word = "drop path" if kind == "DropPath" else "dropout" if "Drop" in kind else ""
        rate = next(
            (getattr(layer, name) for name in ("drop_prob", "p", "prob") if hasattr(layer, name)), 0.0
        )
        if word and isinstance(rate, float | int) and rate > 0:
            found[word] = max(found.get(word, 0.0), float(rate))
    return ", ".join(f"{word} (up to {rate:g})" for word, rate in found.items())


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _timm() -> Any:
    ensure_torchvision()
    import timm

    return timm


def _entrypoint(name: str) -> Any:
    return _timm().model_entrypoint(name.partition(".")[0])
