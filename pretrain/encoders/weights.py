"""Weights to start a new run from: official checkpoints, exports, anything timm opens.

    a folder                     an export of keel's or any other timm `local-dir`
    a name of timm's             downloaded if it isn't cached: vit_base_patch16_224.mae
    a file                       .safetensors, or a PyTorch checkpoint in one of these layouts:
        MAE                      {"model": timm's names}, the decoder beside them (facebookresearch/mae)
        MoCo v1, v2              module.encoder_q.*, its head in fc.* (facebookresearch/moco)
        MoCo v3                  module.base_encoder.*, its head in head.* or fc.* (facebookresearch/moco-v3)
        CLIP                     visual.* of OpenAI's or open_clip's state dict, JIT archives aside
        plain                    timm's own names

What isn't the encoder's (decoder, heads, text tower, queue) is left out by these lists, and said; anything
else that is missing or left over is an error that names it. Checkpoints are read without executing code from
them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import RunError
from pretrain.encoders import hub


@dataclass(frozen=True)
class Layout:
    """How a project names an encoder's weights in its checkpoints."""

    name: str
    prefix: str  # in front of timm's names
    head: tuple[str, ...] = ()  # behind the prefix: not the encoder's


LAYOUTS = (
    Layout("MoCo v1 or v2", "module.encoder_q.", ("fc.",)),
    Layout("MoCo v3", "module.base_encoder.", ("fc.", "head.")),
    Layout("open_clip with timm's tower", "visual.trunk."),
    Layout("CLIP", "visual."),
    Layout("distributed", "module.", ("fc.", "head.")),
    Layout("MAE or plain", "", ("decoder_", "mask_token", "fc.", "head.")),
)
"""The first whose prefix some name begins with is taken."""


@dataclass(frozen=True)
class Loaded:
    """What was taken from a source, and what of it was not."""

    layout: str
    left_out: tuple[str, ...] = ()  # modules and parameters that aren't the encoder's
    grid: tuple[int, int] | None = None  # what positions were resampled to, where they were

    def __str__(self) -> str:
        positions = f", positions resampled to {self.grid[0]} x {self.grid[1]}" if self.grid else ""
        return f"read as {self.layout}, left out: {', '.join(self.left_out) or 'nothing'}{positions}"


def load(encoder: nn.Module, source: str) -> Loaded:
    """Put the weights of `source` into `encoder`, which has no classifier.

    Positions are resampled where the image size differs, as timm does. Raises `RunError` naming what doesn't
    fit; the encoder is then unchanged.
    """
    own = encoder.state_dict()
    path = Path(source).expanduser()
    found, loaded = _of_file(encoder, path) if path.is_file() else _of_timm(encoder, source)
    there = found.get("pos_embed")
    found = {name: _resampled(encoder, name, value, own) for name, value in found.items()}
    if there is not None and found["pos_embed"] is not there:
        loaded = replace(loaded, grid=tuple(encoder.patch_embed.grid_size))  # type: ignore[arg-type, union-attr]
    missing, unknown = _modules(own.keys() - found.keys(), own), _modules(found.keys() - own.keys(), found)
    wrong = [
        f"{name} is {tuple(value.shape)} there and {tuple(own[name].shape)} here"
        for name, value in sorted(found.items())
        if name in own and value.shape != own[name].shape
    ]
    if missing or unknown or wrong:
        told = [f"lacks {', '.join(missing)}"] if missing else []
        told += [f"has unknown {', '.join(unknown)}"] if unknown else []
        told += [*wrong[:4], f"{len(wrong) - 4} more differ in shape"] if len(wrong) > 4 else wrong
        raise RunError(
            f"encoder.weights: {source} doesn't fit this encoder: {'; '.join(told)}; "
            "set encoder.name and encoder.args to what the weights were trained as"
        )
    encoder.load_state_dict(found, strict=True)
    return loaded


def _modules(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Every one of `names`; where they are all there is in a module, as one: blocks.1.*"""
    kept = [name + "." for name in set(everything) - set(names)]
    found = set()
    for name in names:
        parts = name.split(".")
        starts = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
        whole = next((start for start in starts if not any(k.startswith(start) for k in kept)), None)
        found.add(name if whole is None else f"{whole}*")
    return sorted(found)


def _of_file(encoder: nn.Module, path: Path) -> tuple[dict[str, Tensor], Loaded]:
    tensors = _flat(_read(path), path)
    layout = next(layout for layout in LAYOUTS if any(name.startswith(layout.prefix) for name in tensors))
    inside = {
        name.removeprefix(layout.prefix): value
        for name, value in tensors.items()
        if name.startswith(layout.prefix)
    }
    own = encoder.state_dict()
    heads = {name for name in inside if name.startswith(layout.head) and name not in own}
    outside = tensors.keys() - {layout.prefix + name for name in inside}
    loaded = Loaded(layout.name, _roots(heads | outside))
    kept = {name: value for name, value in inside.items() if name not in heads}
    return (_converted_clip(encoder, kept) if layout.name == "CLIP" else kept), loaded


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # Checkpoints of argparse's time carry their command line; nothing else than data is let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"encoder.weights: {path} isn't a checkpoint that can be read without executing code from it "
            f"({reason}); save its tensors as .safetensors"
        ) from error


def _flat(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under whichever of the usual keys it lies."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    )
    if not tensors:
        raise RunError(
            f"encoder.weights: {path} holds no tensors under model, state_dict or its top level; "
            "save a state dict"
        )
    return tensors


def _converted_clip(encoder: nn.Module, visual: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's own conversion of CLIP's image towers to its names; for a ResNet timm has another network."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if not isinstance(encoder, VisionTransformer):
        raise RunError(
            "encoder.weights: CLIP's own ResNets are other networks than timm's; "
            "use the weights of a ViT and an encoder.name of timm's vit_*_clip_* family"
        )
    converted = checkpoint_filter_fn({f"visual.{name}": value for name, value in visual.items()}, encoder)
    return {name: value for name, value in converted.items() if not name.startswith("head.")}


def _of_timm(encoder: nn.Module, source: str) -> tuple[dict[str, Tensor], Loaded]:
    import timm

    name = hub.timm_name(source, "encoder.weights: ")
    try:
        with hub.hub_within_reach(name):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm raises whatever its downloader, its readers or the model raise
        raise RunError(
            f"encoder.weights: timm can't open {source}: {hub.why(name, error)}; "
            "check the name and the network"
        ) from error
    found: dict[str, Tensor] = model.state_dict()
    own = encoder.state_dict()
    # A mean-pooling ViT keeps its last norm behind the pooling, under another name.
    if "fc_norm.weight" in found and "fc_norm.weight" not in own:
        found = {name.replace("fc_norm.", "norm."): value for name, value in found.items()}
    return found, Loaded("timm's")


def _resampled(encoder: nn.Module, name: str, value: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    if name != "pos_embed" or name not in own or value.shape == own[name].shape:
        return value
    from timm.layers import resample_abs_pos_embed

    prefix = int(getattr(encoder, "num_prefix_tokens", 0))
    if value.shape[-1] != own[name].shape[-1]:
        return value
    grid = encoder.patch_embed.grid_size  # type: ignore[union-attr]
    resampled = resample_abs_pos_embed(value, new_size=list(grid), num_prefix_tokens=prefix)  # type: ignore[arg-type]
    assert isinstance(resampled, Tensor)
    return resampled


def _roots(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name.removeprefix("module.").partition(".")[0] for name in names}))
