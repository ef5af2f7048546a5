"""Weights to start a new run from: official checkpoints, exports, anything timm opens.

    a folder                     an export of keel's or any other timm `local-dir`
    a name of timm's             downloaded if it isn't cached: vit_base_patch16_224.mae
    a file                       .safetensors, or a PyTorch checkpoint in one of these layouts:
        MAE                      {"model": timm's names}, the decoder beside them (facebookresearch/mae)
        MoCo v1, v2              module.encoder_q.*, its head in fc.* (facebookresearch/moco)
        MoCo v3                  module.base_encoder.*, its head in head.* or fc.* (facebookresearch/moco-v3)
        CLIP                     visual.* of OpenAI's or open_clip's state dict, JIT archives aside
        plain                    timm's own names
      each also as several processes or a compiler save it, with module. or _orig_mod. in front of all names

What isn't the encoder's (decoder, heads, text tower, queue) is left out by these lists, and said; anything
else that is missing or left over is an error that names it. What tensors alone can't tell is compared where
the source says it (activations, heads, norms, the grid of positions), and said where it doesn't. Checkpoints
are read without executing code from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import RunError
from pretrain.encoders import hub, positions, registered
from pretrain.encoders.positions import Grid


@dataclass(frozen=True)
class Layout:
    """How a project names an encoder's weights in its checkpoints."""

    name: str
    prefix: str  # in front of timm's names
    head: tuple[str, ...] = ()  # behind the prefix: not the encoder's


LAYOUTS = (
    Layout("MoCo v1 or v2", "encoder_q.", ("fc.",)),
    Layout("MoCo v3", "base_encoder.", ("fc.", "head.")),
    Layout("open_clip with timm's tower", "visual.trunk."),
    Layout("CLIP", "visual."),
    Layout("MAE or plain", "", ("decoder_", "mask_token", "fc.", "head.", "classifier.")),
)
"""The first whose prefix some name begins with is taken."""

_WRAPPERS = ("module.", "_orig_mod.")
"""In front of every name: what torch's DistributedDataParallel and compile put there."""

_OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Only OpenAI's own CLIP files have these among their tensors; all its networks have the quick GELU."""


@dataclass(frozen=True)
class Loaded:
    """What was taken from a source, and what of it was not."""

    layout: str
    left_out: tuple[str, ...] = ()  # modules and parameters that aren't the encoder's
    grid: Grid | None = None  # what positions were resampled to, where they were
    notes: tuple[str, ...] = ()  # what had to be assumed

    def __str__(self) -> str:
        positions = f", positions resampled to {self.grid[0]} x {self.grid[1]}" if self.grid else ""
        told = "".join(f"; {note}" for note in self.notes)
        return f"read as {self.layout}, left out: {', '.join(self.left_out) or 'nothing'}{positions}{told}"


@dataclass(frozen=True)
class _Source:
    """Tensors under the encoder's names, and what else is known of the network that they are of."""

    tensors: dict[str, Tensor]
    loaded: Loaded
    network: nn.Module | None = None  # where timm has made it
    grid: Grid | None = None  # of its positions


def load(encoder: nn.Module, source: str, image_size: int | tuple[int, int] | None = None) -> Loaded:
    """Put the weights of `source` into `encoder`, which has no classifier.

    Positions are resampled where the image size differs, as timm does; `image_size` is what they were trained
    with, where a file can't tell it. Raises `RunError` naming what doesn't fit; the encoder is then
    unchanged.
    """
    path = Path(source).expanduser()
    given = _of_file(encoder, path) if path.is_file() else _of_timm(encoder, source)
    if image_size is not None:
        given = replace(given, grid=positions.grid_at(encoder, image_size))
    _refuse_not_finite(given.tensors, source)
    found, grid, note = positions.fitted(encoder, given.tensors, given.grid, source)
    notes = (*given.loaded.notes, *([note] if note else []))
    loaded = replace(given.loaded, grid=grid, notes=notes)
    _refuse_misfit(encoder.state_dict(), found, source)
    _refuse_unlike(encoder, given, source)
    encoder.load_state_dict(found, strict=True)
    return loaded


def carry_over(given: nn.Module, encoder: nn.Module, source: str) -> None:
    """Put the weights of one encoder into another of the same architecture, made for images of another size.

    Raises `RunError` where more than positions differs.
    """
    found, _, _ = positions.fitted(encoder, given.state_dict(), positions.grid_of(given), source)
    _refuse_misfit(encoder.state_dict(), found, source)
    encoder.load_state_dict(found, strict=True)


def _refuse_not_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    ill = [
        name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if ill:
        raise RunError(
            f"encoder.weights: {source}: {len(ill)} of its tensors hold NaN or infinity, such as {ill[0]}: "
            "that network had diverged; take an earlier checkpoint"
        )


def _refuse_unlike(encoder: nn.Module, given: _Source, source: str) -> None:
    """What two networks can differ in though their tensors have the same names and shapes."""
    if given.network is None:
        return
    theirs = dict(given.network.named_modules())
    for name, module in encoder.named_modules():
        other = theirs.get(name)
        if other is None or isinstance(module, nn.Dropout) or "Drop" in type(module).__name__:
            continue
        here, there = _character(module), _character(other)
        if here != there:
            raise RunError(
                f"encoder.weights: {source} is of another network than this encoder: {name or 'it'} is "
                f"{there} there "
                f"and {here} here; set encoder.name and encoder.args to what the weights were trained as"
            )


def _character(module: nn.Module) -> str:
    """What a module computes beside its weights; its numbers of inputs and outputs are their shapes'."""
    heads = f" of {module.num_heads} heads" if isinstance(getattr(module, "num_heads", None), int) else ""
    eps = f" of eps {module.eps:g}" if isinstance(getattr(module, "eps", None), float) else ""
    kind = "" if any(module.children()) else type(module).__name__
    return f"{kind}{heads}{eps}".strip() or "a module"


def _refuse_misfit(own: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
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
        if "fc_norm.weight" in found and "fc_norm.weight" not in own:
            told.append("its last norm is behind the pooling, as encoder.args.global_pool=avg makes it")
        raise RunError(
            f"encoder.weights: {source} doesn't fit this encoder: {'; '.join(told)}; "
            "set encoder.name and encoder.args to what the weights were trained as"
        )


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


def _of_file(encoder: nn.Module, path: Path) -> _Source:
    tensors, wrapped = _unwrapped(_flat(_read(path), path))
    layout = next(layout for layout in LAYOUTS if any(name.startswith(layout.prefix) for name in tensors))
    inside = {
        name.removeprefix(layout.prefix): value
        for name, value in tensors.items()
        if name.startswith(layout.prefix)
    }
    own = encoder.state_dict()
    last = (*layout.head, *(f"{name}." for name in classifiers(encoder)))
    heads = {name for name in inside if name.startswith(last) and name not in own}
    outside = tensors.keys() - {layout.prefix + name for name in inside}
    notes: tuple[str, ...] = ()
    kept = {name: value for name, value in inside.items() if name not in heads}
    if layout.name == "CLIP":
        notes = _activation(encoder, tensors.keys(), path)
        kept = _converted_clip(encoder, kept)
    name = "distributed" if wrapped and layout.prefix == "" else layout.name
    return _Source(
        kept, Loaded(name, _roots(heads | outside), notes=notes), grid=_described_grid(encoder, path)
    )


def _unwrapped(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Without what wrappers put in front of every name, and whether there was any."""
    wrapped = False
    while prefix := next((w for w in _WRAPPERS if all(name.startswith(w) for name in tensors)), None):
        tensors, wrapped = {name.removeprefix(prefix): value for name, value in tensors.items()}, True
    return tensors, wrapped


def classifiers(encoder: nn.Module) -> tuple[str, ...]:
    """timm's names of the architecture's last layer: one, or several; none where it doesn't say."""
    known = getattr(encoder, "pretrained_cfg", None) or {}
    found = known.get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _activation(encoder: nn.Module, names: Iterable[str], path: Path) -> tuple[str, ...]:
    """Refuses OpenAI's files for another activation than theirs; else says that a file can't tell."""
    kinds = {type(m).__name__ for m in encoder.modules() if "GELU" in type(m).__name__}
    quick = "QuickGELU" in kinds
    if set(names) >= _OPENAI:
        if not quick:
            raise RunError(
                f"encoder.weights: {path} is of OpenAI's CLIP, whose activation is the quick GELU, and this "
                "encoder has the exact one; use an encoder.name of timm's vit_*_clip_quickgelu_* family"
            )
        return ()
    here = "quick GELU" if quick else "exact GELU"
    return (
        f"the file doesn't say its activation, and this encoder has the {here}: OpenAI's weights and "
        "open_clip's -quickgelu ones are of the quick GELU (timm's vit_*_clip_quickgelu_*), its others of "
        "the exact one",
    )


def _described_grid(encoder: nn.Module, path: Path) -> Grid | None:
    """Of a file that lies in an export: its config.json says the images' size."""
    try:
        described = json.loads((path.parent / "config.json").read_text())
        size = described["model_args"]["img_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return positions.grid_at(encoder, size if isinstance(size, int) else (int(size[0]), int(size[1])))


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


def _of_timm(encoder: nn.Module, source: str) -> _Source:
    import timm

    folder = hub.folder_of(source)
    if folder is not None:
        _bring(folder)
    name = hub.timm_name(source, "encoder.weights: ")
    try:
        with hub.hub_within_reach(name):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm raises whatever its downloader, its readers or the model raise
        raise RunError(
            f"encoder.weights: timm can't open {source}: {hub.why(name, error)}; "
            "check the name and the network"
        ) from error
    return _Source(model.state_dict(), Loaded("timm's"), model, positions.grid_of(model))


def _bring(folder: Path) -> None:
    """Import what registers the architecture of an export, where that isn't timm's own."""
    try:
        modules = registered.opened_with(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError):
        return  # timm says what is wrong with it
    try:
        registered.bring(modules)
    except ValueError as error:
        raise RunError(f"encoder.weights: {folder}: its architecture is registered by {error}") from error


def _roots(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name.removeprefix("module.").partition(".")[0] for name in names}))
