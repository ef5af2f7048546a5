"""A trained encoder as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    FOLDER/model.safetensors   the encoder's weights under timm's own names, float32
           config.json         architecture, every model argument, preprocessing, licence, lowest timm
           README.md           what it is and how to load it (`export_card`)
           loss.png            its loss over training

The same folder is what model hubs hold (format "hf"): it is then opened as "hf-hub:" instead, out of a hub's
cache, and its card says how to upload it.

The folder appears under its name only after a fresh process, which imports nothing of keel, has opened it and
computed the same numbers.
"""

from __future__ import annotations

import errno
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
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import RunError
from data_pipeline.types import CenterCrop, ViewSpec
from pretrain import encoders
from pretrain.encoders import EncoderConfig, registered, reopen, torchvision_compat
from pretrain.export import card
from pretrain.export.card import Card, Story
from pretrain.export.check import ExportMismatchError, largest_difference, require_finite
from pretrain.objective import Weights
from pretrain.run.trained import read

Format = Literal["timm", "hf"]
"""What an exported encoder is opened as, by the check and by its card: a folder, or a hub's model."""

LOWEST_TIMM = "1.0.20"
"""Oldest timm whose local-dir reader was seen to open these folders."""


@dataclass(frozen=True)
class Backbone:
    """Everything an export needs to know of an encoder."""

    encoder: nn.Module  # made by `encoders.build`, weights loaded
    config: EncoderConfig
    view: ViewSpec  # the evaluation view: centre crop, and the normalisation it was trained with
    story: Story = field(default_factory=lambda: Story({}, {}))  # for the model card
    licence: str = "other"  # of the weights; keel's own licence says nothing about them


@dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    folder: Path
    architecture: str
    parameters: int
    max_difference: float  # of features and tokens, fresh process against the trained encoder
    remarks: tuple[str, ...] = ()  # what is otherwise than the run had it, or couldn't be compared


def export(
    run: Path,
    to: Path,
    *,
    step: int | None = None,
    weights: Weights = "model",
    form: Format = "timm",
    force: bool = False,
    licence: str = "other",
) -> ExportResult:
    """Export an encoder of a run's newest checkpoint, or of the one at `step`; see `write`, `trained.read`.

    Straight from the checkpoint, whatever ranks and ZeRO stage wrote it: needs no process group and no GPU.
    """
    _refuse_taken(to, force)
    require_importable()
    trained = read(run, step, weights)
    story = Story(trained.facts(), trained.recipe(), trained.losses())
    backbone = Backbone(trained.encoder, trained.config.encoder, trained.view, story, licence)
    return write(backbone, to, form=form, force=force)


def write(backbone: Backbone, to: Path, *, form: Format = "timm", force: bool = False) -> ExportResult:
    """Write, verify in a fresh process, and only then give the folder its name.

    Raises `RunError` where `to` is taken (with `force` an older export is replaced), `ExportMismatchError`
    where the reopened model differs (`export_check`). On any failure what was there stays untouched.
    """
    with folder_for(to, force=force) as partial:
        with writing_to(to):
            save_weights(dict(_state(backbone)), partial / "model.safetensors")
            (partial / "config.json").write_text(json.dumps(timm_config(backbone), indent=2) + "\n")
        difference = verify(backbone, partial, form)
        with writing_to(to):
            card.write(_card(backbone, form, difference), backbone.story, partial)
    count = encoders.parameter_count(backbone.encoder)
    return ExportResult(to, backbone.config.name, count, difference)


def require_importable() -> None:
    """Raises `RunError` where a fresh process can't import timm here, for want of torchvision."""
    if (problem := torchvision_compat.problem()) is not None:
        raise RunError(problem)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """As float32. Raises OSError where the disk won't take them."""
    own = {name: value.detach().float().cpu().clone().contiguous() for name, value in weights.items()}
    try:
        save_file(own, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk arrives so
        raise OSError(str(error)) from error


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
    known = getattr(encoder, "pretrained_cfg", None) or {}
    pretrained = {
        "tag": "keel",
        "custom_load": False,
        "input_size": [view.channels, *view.size],
        "fixed_input_size": bool(known.get("fixed_input_size", False)),
        "interpolation": view.interpolation,
        "crop_pct": view.crop.fraction,
        "crop_mode": "center",
        "mean": list(view.statistics[0]),
        "std": list(view.statistics[1]),
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
        "keel": {"lowest_timm": LOWEST_TIMM, "imports": _imports(backbone), **backbone.story.facts},
    }


def model_args(backbone: Backbone) -> dict[str, Any]:
    """Every argument that makes the same network again, and pools as it was trained."""
    return encoders.arguments(backbone.config, backbone.view.size)


def _pooling(backbone: Backbone) -> str:
    return str(model_args(backbone).get("global_pool") or encoders.own_pooling(backbone.encoder) or "avg")


def _imports(backbone: Backbone) -> list[str]:
    """Modules without which timm doesn't know the architecture."""
    return registered.origins(backbone.config.name, backbone.config.imports)


def verify(backbone: Backbone, folder: Path, form: Format = "timm") -> float:
    """Open `folder` in a fresh process and compare; the largest absolute difference of any output.

    Raises `RunError` where the encoder itself isn't finite, `ExportMismatchError` where the difference is
    `export_check.TOLERANCE` or more, or where the folder doesn't open.
    """
    view = backbone.view
    images = torch.randn(2, view.channels, *view.size, generator=torch.Generator().manual_seed(0))
    encoder: Any = backbone.encoder
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        expected = {
            "features": encoders.features(encoder, images),
            "tokens": reopen.tokens(encoder, images),
        }
    encoder.train(was_training)
    require_finite(dict(encoder.named_parameters()) | expected)
    return largest_difference(expected, _reopened(folder, images, form))


def _reopened(folder: Path, images: Tensor, form: Format = "timm") -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({"images": images}, inputs)
        name = f"local-dir:{folder.absolute()}" if form == "timm" else _in_a_cache(folder, Path(scratch))
        script = Path(reopen.__file__)
        # -P: neither the working directory nor the script's own folder may offer modules
        command = [sys.executable, "-P", str(script), name, str(inputs), str(outputs)]
        command += registered.opened_with(json.loads((folder / "config.json").read_text()))
        offline = {"HF_HUB_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(
            command, cwd=scratch, env=os.environ | offline, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
        if run.returncode:
            raise ExportMismatchError(f"a fresh process can't open the export:\n{run.stderr[-4000:]}")
        found: dict[str, Tensor] = load_file(outputs)
        return found


def _in_a_cache(folder: Path, cache: Path) -> str:
    """The name of `folder` as a hub's model that its client has in `cache` already."""
    model, commit = cache / "models--keel--export", "0" * 40
    (model / "snapshots").mkdir(parents=True)
    (model / "snapshots" / commit).symlink_to(folder.absolute(), target_is_directory=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return "hf-hub:keel/export"


def _card(backbone: Backbone, form: Format, difference: float) -> Card:
    view, width = backbone.view, encoders.width(backbone.encoder)
    place = "local-dir:path/to/this/folder" if form == "timm" else "hf-hub:OWNER/NAME"
    note = (
        "`timm.data.create_transform(**timm.data.resolve_model_data_config(model))` prepares images as the\n"
        f"run's evaluations did (mean {view.statistics[0]}, std {view.statistics[1]}, "
        f"{view.interpolation}).\n"
        f"Needs timm {LOWEST_TIMM} or later; add `num_classes=N` for a fresh classifier."
    )
    if view.grey:
        note += (
            '\nIt takes grey pictures of one channel: convert them first, `image.convert("L")`, as '
            "timm's\n`input_img_mode='L'` does."
        )
    imports = _imports(backbone)
    if form == "hf":
        note += (
            "\n\nUpload this folder with `hf upload OWNER/NAME path/to/this/folder`. transformers opens it,\n"
            'too: `AutoModel.from_pretrained("OWNER/NAME")`, by its wrapper of timm.'
        )
    return Card(
        title=f"{backbone.config.name}, pretrained with keel",
        library="timm",
        tags=("image-feature-extraction", "timm", *(("transformers",) if form == "hf" else ())),
        licence=backbone.licence,
        loading=(
            "import timm\n"
            + "".join(f"import {name}  # registers the architecture\n" for name in imports)
            + f'model = timm.create_model("{place}", pretrained=True)  # without `pretrained`: random!\n'
            f"features = model.eval()(images)  # (B, {view.channels}, {view.size[0]}, {view.size[1]}) -> "
            f"(B, {width})"
        ),
        note=note,
        difference=difference,
    )


@contextmanager
def folder_for(to: Path, *, force: bool, ours: str = "config.json") -> Iterator[Path]:
    """A temporary folder that gets the name `to` when the block ends well, and else vanishes.

    Raises `RunError` where `to` is taken or can't be made; with `force` an older export, known by its file
    `ours`, may go.
    """
    _refuse_taken(to, force, ours)
    with writing_to(to):
        partial = _beside(to)
    try:
        yield partial
        with writing_to(to):
            _publish(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing_to(to: Path) -> Iterator[None]:
    """An OSError within is the user's: a `RunError` that names `to`."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        raise RunError(f"{to}: can't be written: {what}; make room or choose another folder") from error


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


def _beside(to: Path) -> Path:
    """A new temporary folder next to `to`."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, f"{to.parent} is a file") from error
    partial = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    partial.chmod(0o755)
    return partial


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
        except OSError as error:
            try:
                older.rename(to)
            except OSError:
                what = (
                    f"{error.strerror or error}, nor could the older export get its name back: it is {older}"
                )
                raise OSError(error.errno, what) from error
            raise
        shutil.rmtree(older)
    else:
        partial.rename(to)
