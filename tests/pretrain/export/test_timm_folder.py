"""An export holds what timm needs to compute the same features, and appears whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from configs.errors import RunError
from data_pipeline.transform import center_view
from data_pipeline.types import CenterCrop, ViewSpec
from pretrain import encoders
from pretrain.encoders import EncoderConfig
from pretrain.export import card, timm_folder
from pretrain.export.check import ExportMismatchError

timm = pytest.importorskip("timm")

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8}


def backbone(
    name: str, args: dict[str, Any], size: tuple[int, int] = (32, 32), **config: Any
) -> timm_folder.Backbone:
    """An encoder whose weights were moved away from their initial values, as training would."""
    chosen = EncoderConfig(name=name, args=args, **config)
    torch.manual_seed(1)
    encoder = encoders.build(chosen, size)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for key, buffer in encoder.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_()
    view = ViewSpec(size=size, crop=CenterCrop(0.9), flip=0.0)
    return timm_folder.Backbone(encoder, chosen, view, card.Story({"step": 12}, {}), "apache-2.0")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reopens through timm in this process: much quicker, for the cases about what is written."""

    def reopened(folder: Path, images: Tensor, form: timm_folder.Format = "timm") -> dict[str, Tensor]:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            return {"features": model(images), "tokens": model.forward_features(images)}

    monkeypatch.setattr(timm_folder, "_reopened", reopened)


def test_a_fresh_process_that_knows_no_keel_computes_the_same(tmp_path: Path) -> None:
    result = timm_folder.write(backbone("vit_tiny_patch16_224", TINY, pooling="avg"), tmp_path / "out")
    assert result.max_difference < 1e-5
    assert sorted(p.name for p in result.folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "a temporary folder was left behind"
    assert f"{result.max_difference:.1e}" in (result.folder / "README.md").read_text()


CASES = {
    "class token": backbone("vit_tiny_patch16_224", TINY),
    "12 heads in a ViT-S": backbone("vit_small_patch16_224", {"num_heads": 12, "depth": 1}, (32, 32)),
    "mean of patches": backbone("vit_tiny_patch16_224", TINY, pooling="avg"),
    "timm's own mean pooling, with fc_norm": backbone("vit_tiny_patch16_224", TINY | {"global_pool": "avg"}),
    "not square": backbone("vit_tiny_patch16_224", TINY, (32, 48)),
    "no class token": backbone(
        "vit_tiny_patch16_224", TINY | {"class_token": False, "global_pool": "avg", "fc_norm": False}
    ),
    "ResNet": backbone("resnet18", {}, pooling="avg"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("in_process")
def test_every_architecture_and_pooling_round_trips(case: str, tmp_path: Path) -> None:
    result = timm_folder.write(CASES[case], tmp_path / "out")
    assert result.max_difference < 1e-5
    assert result.architecture == CASES[case].config.name


@pytest.mark.usefixtures("in_process")
def test_preprocessing_is_the_runs_and_not_the_architectures(tmp_path: Path) -> None:
    ours = backbone("vit_base_patch16_224", TINY)  # timm's default for this name is mean 0.5, crop 0.9
    own = replace(ours.view, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), interpolation="bilinear")
    for view in (own, replace(own, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=CenterCrop(1.0))):
        timm_folder.write(replace(ours, view=view), tmp_path / "out", force=True)
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
        found = timm.data.resolve_model_data_config(model)
        assert (tuple(found["mean"]), tuple(found["std"])) == (view.mean, view.std)
        assert (found["crop_pct"], found["interpolation"]) == (view.crop.fraction, view.interpolation)
        assert tuple(found["input_size"]) == (3, 32, 32)
        assert model.pretrained_cfg["license"] == "apache-2.0"


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (32, 48)])
def test_timm_shows_the_backbone_the_same_pixels(size: tuple[int, int]) -> None:
    """timm's own transform from the exported settings against the view that evaluations use."""
    generator = np.random.default_rng(0)
    for height, width in ((375, 500), (387, 362), (250, 900)):
        coarse = generator.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        for fraction in (0.875, 0.9, 1.0):
            view = ViewSpec(size=size, crop=CenterCrop(fraction), flip=0.0, mean=(0, 0, 0), std=(1, 1, 1))
            settings = {"input_size": (3, *size), "crop_pct": fraction, "mean": view.mean, "std": view.std}
            theirs = timm.data.create_transform(**settings, interpolation="bicubic", crop_mode="center")(
                picture
            )
            ours = center_view(np.array(picture), view, fraction)[0]
            assert (theirs * 255 - ours).abs().max() <= 2.01, (height, width, fraction)


@pytest.mark.parametrize("case", ["mean of patches", "ResNet"])
@pytest.mark.usefixtures("in_process")
def test_a_classifier_can_be_put_on_it(case: str, tmp_path: Path) -> None:
    timm_folder.write(CASES[case], tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7).eval()
    trained = CASES[case].encoder.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model(images).shape == (2, 7)
        torch.testing.assert_close(model.forward_features(images), trained.forward_features(images))  # type: ignore[operator]


@pytest.mark.usefixtures("in_process")
def test_a_folder_in_the_way_is_refused_and_kept(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(RunError, match="taken: exists"):
            timm_folder.write(CASES["class token"], taken, force=force)
    assert [p.name for p in taken.iterdir()] == ["thesis.txt"]


def test_what_does_not_verify_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic silent failure: the head count is forgotten, and the folder opens as another network."""
    right = timm_folder.timm_config
    to = tmp_path / "out"
    to.mkdir()
    (to / "config.json").write_text(json.dumps({"keel": {"step": 1}}))

    def forgetful(subject: timm_folder.Backbone) -> dict[str, Any]:
        config = right(subject)
        del config["model_args"]["num_heads"]
        return config

    monkeypatch.setattr(timm_folder, "timm_config", forgetful)
    with pytest.raises(ExportMismatchError, match="outputs differ by"):
        timm_folder.write(CASES["class token"], to, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in to.iterdir()] == ["config.json"], "the older export was touched"


def test_a_network_that_does_not_open_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_folder, "timm_config", lambda subject: {"architecture": "no_such_model"})
    with pytest.raises(ExportMismatchError, match="can't open the export"):
        timm_folder.write(CASES["class token"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("value", [float("nan"), 2.5e19])
def test_a_diverged_encoder_is_not_exported(tmp_path: Path, value: float) -> None:
    """A NaN in one weight, and finite weights whose features aren't: told, not passed as "no difference"."""
    subject = backbone("vit_tiny_patch16_224", TINY)
    with torch.no_grad():
        for block in subject.encoder.blocks:  # type: ignore[union-attr]
            block.attn.qkv.weight.fill_(value)
            block.mlp.fc1.weight.fill_(value), block.mlp.fc2.weight.fill_(value)
    with pytest.raises(RunError, match="aren't finite numbers: training has diverged; take an earlier"):
        timm_folder.write(subject, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("in_process")
def test_exporting_leaves_the_encoder_as_it_was(tmp_path: Path) -> None:
    subject = backbone("resnet18", {})
    subject.encoder.train()
    before = {name: value.clone() for name, value in subject.encoder.state_dict().items()}
    timm_folder.write(subject, tmp_path / "out")
    assert all(module.training for module in subject.encoder.modules())
    for name, value in subject.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
