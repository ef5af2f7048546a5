"""A trained encoder as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    FOLDER/model.safetensors   the encoder's weights under timm's own names, float32
           config.json         architecture, every model argument, preprocessing, licence, lowest timm
           README.md           what it is and how to load it

The folder appears under its name only after a fresh process, which imports nothing of keel, has opened it and
computed the same numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import RunError
from data_pipeline.types import CenterCrop, ViewSpec
from pretrain import encoders
from pretrain.encoders import EncoderConfig, torchvision_compat
from pretrain.trained import read

TOLERANCE = 1e-5
"""Largest absolute difference of a float32 feature between the trained encoder and the reopened one."""

LOWEST_TIMM = "1.0.20"
"""Oldest timm whose local-dir reader was seen to open these folders."""


@dataclass(frozen=True)
class Backbone:
    """Everything an export needs to know of an encoder."""

    encoder: nn.Module  # made by `encoders.build`, weights loaded
    config: EncoderConfig
    view: ViewSpec  # the evaluation view: centre crop, and the normalisation it was trained with
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the model card: step, samples, data, ...
    licence: str = "other"  # of the weights; keel's own licence says nothing about them


@dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    folder: Path
    architecture: str
    parameters: int
    max_difference: float  # of features and tokens, fresh process against the trained encoder


class ExportMismatchError(RuntimeError):
    """The reopened folder doesn't compute what the trained encoder does."""


def export(
    run: Path, to: Path, *, step: int | None = None, force: bool = False, licence: str = "other"
) -> ExportResult:
    """Export the encoder of a run's newest checkpoint, or of the one at `step`; see `write`.

    Straight from the checkpoint, whatever ranks and ZeRO stage wrote it: needs no process group and no GPU.
    """
    _refuse_taken(to, force)
    trained = read(run, step)
    backbone = Backbone(trained.encoder, trained.config.encoder, trained.view, trained.facts(), licence)
    return write(backbone, to, force=force)


def write(backbone: Backbone, to: Path, *, force: bool = False) -> ExportResult:
    """Write, verify in a fresh process, and only then give the folder its name.

    Raises `RunError` where `to` is taken (with `force` an older export is replaced), `ExportMismatchError`
    where the reopened model differs by `TOLERANCE` or more. On any failure what was there stays untouched.
    """
    with folder_for(to, force=force) as partial:
        weights = {
            name: value.detach().float().cpu().clone().contiguous() for name, value in _state(backbone)
        }
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(timm_config(backbone), indent=2) + "\n")
        difference = verify(backbone, partial)
        (partial / "README.md").write_text(model_card(backbone, difference))
    count = encoders.parameter_count(backbone.encoder)
    return ExportResult(to, backbone.config.name, count, difference)


def _state(backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
    for name, value in backbone.encoder.state_dict().items():
        # timm's readers guess the origin of a checkpoint from such names (this one means DINOv2 to them)
        if name == "mask_token":
            raise ValueError(
                "an encoder with a mask_token of its own can't be exported: timm would misread it"
            )
        yield name, value


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """config.json. Written whole instead of by timm's writer.

    timm up to 1.0.28 leaves out the model arguments, and every version fills in the architecture's own mean,
    deviation and crop where a run used others.
    """
    encoder: Any = backbone.encoder
    view, config = backbone.view, backbone.config
    assert isinstance(view.crop, CenterCrop), "an export is shown images as an evaluation is"
    known = encoder.pretrained_cfg
    pretrained = {
        "tag": "keel",
        "custom_load": False,
        "input_size": [3, *view.size],
        "fixed_input_size": bool(known.get("fixed_input_size", False)),
        "interpolation": view.interpolation,
        "crop_pct": view.crop.fraction,
        "crop_mode": "center",
        "mean": list(view.mean),
        "std": list(view.std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
        "license": backbone.licence,
    }
    return {
        "architecture": config.name,
        "num_classes": 0,
        "num_features": encoders.width(encoder),
        "global_pool": _pooling(backbone),
        "model_args": model_args(backbone),
        "pretrained_cfg": pretrained,
        "keel": {"lowest_timm": LOWEST_TIMM, **dict(backbone.facts)},
    }


def model_args(backbone: Backbone) -> dict[str, Any]:
    """Every argument that makes the same network again, and pools as the run's evaluations did."""
    arguments = dict(backbone.config.args)
    if encoders.has_image_size(backbone.config.name):
        arguments.setdefault("img_size", list(backbone.view.size))
    if backbone.config.pooling == "avg" and encoders.is_vit(backbone.encoder):
        # fc_norm=False keeps the norm in front of the mean, as it was trained; timm would move it behind
        arguments |= {"global_pool": "avg", "fc_norm": False}
    return arguments


def _pooling(backbone: Backbone) -> str:
    asked = model_args(backbone).get("global_pool")
    return str(asked or getattr(backbone.encoder, "global_pool", None) or "avg")


def verify(backbone: Backbone, folder: Path) -> float:
    """Open `folder` in a fresh process and compare; the largest absolute difference of any output.

    Raises `ExportMismatchError` where it is `TOLERANCE` or more, or where the folder doesn't open.
    """
    images = torch.randn(2, 3, *backbone.view.size, generator=torch.Generator().manual_seed(0))
    encoder: Any = backbone.encoder
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        expected = {
            "features": encoders.features(encoder, images, backbone.config.pooling),
            "tokens": encoder.forward_features(images),
        }
    encoder.train(was_training)
    got = _reopened(folder, images)
    difference = 0.0
    for name, value in expected.items():
        if got[name].shape != value.shape:
            raise ExportMismatchError(
                f"{name}: {tuple(got[name].shape)} reopened, {tuple(value.shape)} trained"
            )
        difference = max(difference, float((got[name] - value).abs().max()))
    if not difference < TOLERANCE:  # so that NaN fails too
        raise ExportMismatchError(f"outputs differ by {difference:.2e}, allowed is less than {TOLERANCE:.0e}")
    return difference


def _reopened(folder: Path, images: Tensor) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({"images": images}, inputs)
        script, shim = Path(__file__).with_name("export_reopen.py"), torchvision_compat.__file__
        # -P: neither the working directory nor the script's own folder may offer modules
        command = [sys.executable, "-P", str(script), str(folder.absolute()), str(inputs), str(outputs), shim]
        run = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=600, check=False)
        if run.returncode:
            raise ExportMismatchError(f"a fresh process can't open the export:\n{run.stderr[-4000:]}")
        found: dict[str, Tensor] = load_file(outputs)
        return found


def model_card(backbone: Backbone, difference: float) -> str:
    """README.md: what it is, how to load it, what it was made of."""
    facts = dict(backbone.facts)
    judged = facts.pop("evaluations", {})
    facts |= {f"{kind} {name}": f"{v:.4g}" for kind, values in judged.items() for name, v in values.items()}
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    view, width = backbone.view, encoders.width(backbone.encoder)
    return f"""---
library_name: timm
license: {backbone.licence}
---
# {backbone.config.name}, pretrained with keel

```python
import timm
model = timm.create_model("local-dir:path/to/this/folder", pretrained=True)  # without `pretrained`: random!
features = model.eval()(images)  # (B, 3, {view.size[0]}, {view.size[1]}) -> (B, {width})
```

`timm.data.create_transform(**timm.data.resolve_model_data_config(model))` prepares images as in training
(mean {view.mean}, std {view.std}, {view.interpolation}). Needs timm {LOWEST_TIMM} or later; add
`num_classes=N` for a fresh classifier.

| | |
|---|---|
{rows}
| largest difference after reopening | {difference:.1e} |
"""


@contextmanager
def folder_for(to: Path, *, force: bool, ours: str = "config.json") -> Iterator[Path]:
    """A temporary folder that gets the name `to` when the block ends well, and else vanishes.

    Raises `RunError` where `to` is taken; with `force` an older export, known by its file `ours`, may go.
    """
    _refuse_taken(to, force, ours)
    with _beside(to) as partial:
        yield partial
        _publish(partial, to)


def _refuse_taken(to: Path, force: bool, ours: str = "config.json") -> None:
    if not to.exists():
        return
    if not force:
        raise RunError(
            f"{to}: exists already; choose another folder, or add --force to replace an older export"
        )
    try:
        replaceable = "keel" in json.loads((to / ours).read_text())
    except (OSError, ValueError):
        replaceable = False
    if not replaceable:
        raise RunError(
            f"{to}: exists and isn't keel's export: --force won't replace it; choose another folder"
        )


@contextmanager
def _beside(to: Path) -> Iterator[Path]:
    """A temporary folder next to `to`, gone afterwards unless it was published."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    except OSError as error:
        raise RunError(f"{to}: can't be written: {error.strerror}; choose another folder") from error
    partial.chmod(0o755)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, to: Path) -> None:
    for path in (*partial.iterdir(), partial):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if to.exists():  # an older export: it stays beside until the new one has the name
        older = partial.with_name(partial.name + ".older")
        to.rename(older)
        try:
            partial.rename(to)
        except OSError:
            older.rename(to)
            raise
        shutil.rmtree(older)
    else:
        partial.rename(to)
