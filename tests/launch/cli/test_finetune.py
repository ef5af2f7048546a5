"""`keel finetune`: from a timm folder to a classifier that timm opens, and what can't be, in a line."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipeline.manifest import Manifest
from pretrain import encoders
from pretrain.encoders import EncoderConfig
from pretrain.finetune import start_of

Said = tuple[int, str, str]
Keel = Callable[..., Said]
ARCHITECTURE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
QUICK = ("duration=3 steps", "optimizer.warmup=1 steps", "mixup=0", "cutmix=0")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained encoder with a mean of its own, as any `local-dir` of timm's."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(3)
    encoder = encoders.build(EncoderConfig(name="vit_tiny_patch16_224", args=ARCHITECTURE), (32, 32))
    save_file(encoder.state_dict(), folder / "model.safetensors")
    described = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": {**ARCHITECTURE, "img_size": [32, 32]},
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "crop_pct": 1.0,
            "interpolation": "bilinear", "crop_mode": "center", "num_classes": 0,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_from_a_backbone_to_a_classifier(keel: Keel, tmp_path: Path, digits: Path, backbone: Path) -> None:
    to = tmp_path / "classifier"
    code, out, err = keel(
        "finetune", backbone, "--data", digits, "--config", "finetune/smoke", "--to", to, "--workers", 0,
        "--json", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert 0 <= told["top1"] <= told["top5"] <= 100
    model = timm.create_model(f"local-dir:{to}", pretrained=True).eval()
    wants = timm.data.resolve_model_data_config(model)
    assert tuple(wants["mean"]) == (0.5, 0.5, 0.5) and wants["crop_pct"] == 1.0
    assert len(model.pretrained_cfg["label_names"]) == 10
    # Judged again, by timm's own transform and from the bare tars.
    transform = timm.data.create_transform(**wants)
    images, labels = held_out(digits)
    with torch.no_grad():
        ranked = model(torch.stack([transform(image) for image in images])).argmax(dim=1)
    right = 100 * (ranked == torch.tensor(labels)).float().mean()
    assert float(right) == pytest.approx(told["top1"], abs=1.0)  # an image or three by another resampling
    assert keel("finetune", backbone, "--data", digits, "--to", to)[0] == 2  # taken: nothing is trained


def held_out(digits: Path) -> tuple[list[Image.Image], list[int]]:
    images, labels = [], []
    for shard in sorted((digits / "val").glob("*.tar")):
        with tarfile.open(shard) as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        for name in content:
            if name.endswith(".cls"):
                stem = name.removesuffix(".cls")
                picture = next(n for n in content if n.startswith(stem + ".") and n != name)
                images.append(Image.open(io.BytesIO(content[picture])).convert("RGB"))
                labels.append(int(content[name]))
    return images, labels


def test_from_scratch_has_other_weights(backbone: Path) -> None:
    own, scratch = start_of(str(backbone)), start_of(str(backbone), scratch=True)
    assert own.encoder == scratch.encoder and own.mean == scratch.mean == (0.5, 0.5, 0.5)
    assert not torch.equal(
        own.weights["blocks.0.attn.qkv.weight"], scratch.weights["blocks.0.attn.qkv.weight"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing-here", "--data", "DIGITS"],
            "nothing-here: neither a run folder, an exported folder, nor a m",
        ),
        (["BACKBONE", "--data", "nowhere"], "nowhere/train/manifest.json: no such manifest"),
        (["BACKBONE", "--data", "DIGITS", "mixup=x"], "mixup: found 'x'"),
        (
            ["BACKBONE", "--data", "DIGITS", "--config", "finetune/smok"],
            "did you mean configs/finetune/smoke",
        ),
    ],
)
def test_wrong_input_is_a_line(
    keel: Keel, tmp_path: Path, digits: Path, backbone: Path, arguments: list[str], message: str
) -> None:
    places = {"DIGITS": str(digits), "BACKBONE": str(backbone)}
    given = [places.get(argument, argument) for argument in arguments]
    code, _, err = keel("finetune", *given, "--to", tmp_path / "to")
    assert code == 2 and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_classes_must_be_the_same(keel: Keel, tmp_path: Path, digits: Path, backbone: Path) -> None:
    moved = Path(shutil.copytree(digits, tmp_path / "digits"))
    manifest = Manifest.load(moved / "val/manifest.json")
    dataclasses.replace(manifest, classes=manifest.classes[::-1]).save()
    code, _, err = keel("finetune", backbone, "--data", moved)
    assert code == 2 and "its 10 classes aren't the 10 of" in err
