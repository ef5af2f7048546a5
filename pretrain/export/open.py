"""Opens what others, or an export of ours, made: any timm model as an encoder to be judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from configs.errors import RunError
from data_pipeline.types import CenterCrop, ViewSpec
from pretrain.encoders import hub, registered
from pretrain.encoders.torchvision_compat import ensure_torchvision


def open_timm(source: str, *, pretrained: bool = True) -> tuple[nn.Module, ViewSpec]:
    """A pretrained encoder without its classifier, and how it wants to be shown an image.

    `source` is an exported folder, a timm name such as `resnet50.a1_in1k` (downloaded if not cached), or what
    timm itself calls them: local-dir:FOLDER, hf-hub:OWNER/NAME.
    Without `pretrained` its weights are random. Raises `RunError` where it can't be opened.
    """
    ensure_torchvision()
    import timm

    folder = hub.folder_of(source)
    if folder is not None:
        _bring_own(folder)
    name = hub.timm_name(source)
    try:
        with hub.hub_within_reach(name if pretrained else hub.LOCAL):
            model = timm.create_model(name, pretrained=pretrained, num_classes=0).eval()
    except Exception as error:  # timm raises whatever its downloader, its readers or the model raise
        raise RunError(f"{source}: timm can't open it: {hub.why(name, error)}") from error
    assert isinstance(model, nn.Module)
    return model, _view(source, timm.data.resolve_model_data_config(model))


def _bring_own(folder: Path) -> None:
    """Import what registers the architecture of an export, where that isn't timm's own. Raises `RunError`."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return  # timm says what is wrong with it
    try:
        registered.bring(registered.opened_with(config))
    except ValueError as error:
        raise RunError(
            f"{folder}: its architecture, {config.get('architecture')}, is registered by {error}"
        ) from error


def _view(source: str, wants: dict[str, Any]) -> ViewSpec:
    if wants["interpolation"] not in ("bilinear", "bicubic") or wants["crop_mode"] != "center":
        raise RunError(
            f"{source}: wants {wants['interpolation']} resampling and a {wants['crop_mode']} crop; "
            "keel evaluates with bilinear or bicubic and a center crop"
        )
    channels, height, width = wants["input_size"]
    if channels not in (1, 3):
        raise RunError(f"{source}: takes {channels} channels; keel shows an encoder RGB or grey pictures")
    mean, std = (tuple(wants[name]) * (3 if len(wants[name]) == 1 else 1) for name in ("mean", "std"))
    return ViewSpec(
        size=(height, width),
        crop=CenterCrop(wants["crop_pct"]),
        interpolation=wants["interpolation"],
        flip=0.0,
        mean=mean,
        std=std,
        grey=channels == 1,
    )
