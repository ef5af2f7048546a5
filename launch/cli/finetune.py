"""`keel finetune`: an encoder trained on to be a classifier, judged, and written for timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from configs.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.types import CenterCrop
from launch.cli.evaluate import device_named
from launch.progress import progress_bar
from pretrain.encoders import registered
from pretrain.encoders.finetuning import classifier_arguments, reopened
from pretrain.export.check import largest_difference, require_finite
from pretrain.export.timm_folder import folder_for, save_weights, writing_to
from pretrain.finetune import FineTuneConfig, Start, accuracy, fine_tune
from pretrain.judging.subject import evaluation_view


def run(
    start: Start,
    data: Path,
    config: FineTuneConfig,
    *,
    seed: int,
    workers: int,
    to: Path | None,
    device: str = "auto",
) -> dict[str, float]:
    """Fine-tune on DATA/train and judge on DATA/val; with `to`, the classifier goes there.

    Gives top1 and top5 in percent. Raises `UserError`, before training where that can be known.
    """
    train, val = (data / part / "manifest.json" for part in ("train", "val"))
    classes, where = _same_classes(train, val), device_named(device)
    if to is None:
        return _tuned(start, train, val, config, seed, workers, where)[1]
    with folder_for(to, force=False) as partial:
        model, found = _tuned(start, train, val, config, seed, workers, where)
        _write(model.cpu(), start, config, classes, found, partial, to)
    return found


def _tuned(
    start: Start,
    train: Path,
    val: Path,
    config: FineTuneConfig,
    seed: int,
    workers: int,
    device: torch.device,
) -> tuple[nn.Module, dict[str, float]]:
    with progress_bar("fine-tuning") as progress:
        model = fine_tune(start, train, config, seed=seed, device=device, workers=workers, advance=progress)
    view = evaluation_view(start.view(config.augmentation), start.encoder.crop)
    return model, accuracy(model, val, view, device=device, workers=workers)


def _same_classes(train: Path, val: Path) -> tuple[str, ...]:
    learnt, judged = Manifest.load(train).classes, Manifest.load(val).classes
    if not learnt:
        raise DataError(f"{train}: has no class names; index it with keel data index --classes")
    if learnt != judged:
        raise DataError(
            f"{val}: its {len(judged)} classes aren't the {len(learnt)} of {train}; "
            "pack or index both with the same --classes"
        )
    return tuple(learnt)


def _write(
    model: nn.Module,
    start: Start,
    config: FineTuneConfig,
    classes: tuple[str, ...],
    found: dict[str, float],
    folder: Path,
    to: Path,
) -> None:
    """model.safetensors and config.json, opened by timm and compared before they get their name."""
    require_finite(dict(model.named_parameters()))
    described = _config(model, start, config, classes, found)
    with writing_to(to):
        save_weights(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    again = reopened(folder)
    shape = (2, start.encoder.channels, *start.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained, there = {"logits": model.eval()(images)}, {"logits": again(images)}
    largest_difference(trained, there)


def _config(
    model: Any, start: Start, config: FineTuneConfig, classes: tuple[str, ...], found: dict[str, float]
) -> dict[str, Any]:
    arguments = classifier_arguments(start.encoder, start.image_size)
    view = evaluation_view(start.view(config.augmentation), start.encoder.crop)
    assert isinstance(view.crop, CenterCrop)
    pretrained = {
        "tag": "keel", "custom_load": False, "input_size": [view.channels, *view.size],
        "num_classes": len(classes),
        "interpolation": view.interpolation, "crop_pct": view.crop.fraction, "crop_mode": "center",
        "mean": list(view.statistics[0]), "std": list(view.statistics[1]), "label_names": list(classes),
        "first_conv": model.pretrained_cfg.get("first_conv"),
        "classifier": model.pretrained_cfg.get("classifier"),
    }  # fmt: skip
    return {
        "architecture": start.encoder.name,
        "num_classes": len(classes),
        "model_args": arguments,
        "pretrained_cfg": pretrained,
        "keel": {
            "imports": registered.origins(start.encoder.name, start.encoder.imports),
            "fine_tuned": config.model_dump(mode="json"),
            "accuracy": found,
        },
    }


def show(source: str, found: dict[str, float], *, as_json: bool) -> None:
    """Print the figures as a table, or as one JSON object."""
    if as_json:
        print(json.dumps({"source": source, **found}))
        return
    table = Table("fine-tuned", *found)
    table.add_row(source, *(f"{value:.2f}" for value in found.values()))
    Console().print(table)
