"""Fine-tuning starts from the weights given, learns, and leaves the process's random state alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from configs.errors import ConfigError, DataError, RunError
from data_pipeline.manifest import Manifest
from data_pipeline.subset import write_subset
from data_pipeline.types import CenterCrop, ViewSpec
from pretrain import encoders
from pretrain.clock import Duration
from pretrain.encoders import EncoderConfig
from pretrain.encoders.finetuning import classifier, layerwise_groups, mixing
from pretrain.export import timm_folder
from pretrain.finetune import FineTuneConfig, Start, few_shot_accuracy, fine_tune, start_of
from pretrain.optimizers import OptimizerConfig
from pretrain.parts.augmentation import Augmentation

VIT = EncoderConfig(
    name="vit_tiny_patch16_224",
    args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    pooling="avg",
    crop=1.0,
)
RESNET = EncoderConfig(name="resnet18", args={"layers": [1, 1, 1, 0], "channels": [8, 8, 16, 16]}, crop=1.0)
SIZE = (32, 32)


def start(config: EncoderConfig) -> Start:
    torch.manual_seed(0)
    return Start(config, SIZE, encoders.build(config, SIZE).state_dict())


def recipe(steps: int) -> FineTuneConfig:
    return FineTuneConfig(
        duration=Duration(steps, "steps"),
        batch_size=40,
        optimizer=OptimizerConfig(lr=1e-2, warmup=Duration(2, "steps")),
        augmentation=Augmentation(crop_scale=(0.7, 1.0), flip=0.0),
        mixup=0.0, cutmix=0.0, erase=0.0, drop_path=0.0, layer_decay=0.9,
    )  # fmt: skip


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_classifier_holds_the_pretrained_weights(config: EncoderConfig) -> None:
    begin = start(config)
    model = classifier(config, SIZE, 10, begin.weights).eval()
    assert model(torch.randn(2, 3, *SIZE)).shape == (2, 10)
    own = model.state_dict()
    kept = [name for name in begin.weights if name in own]
    assert len(begin.weights) - len(kept) == (2 if config is VIT else 0), "a ViT gives up its last norm"
    assert all(torch.equal(own[name], begin.weights[name]) for name in kept)


def test_weights_of_another_network_are_refused() -> None:
    begin = start(VIT)
    without = {name: value for name, value in begin.weights.items() if "blocks.1.attn.qkv" not in name}
    with pytest.raises(RunError, match=r"pooled by avg: blocks\.1\.attn\.qkv"):
        classifier(VIT, SIZE, 10, without)
    smaller = VIT.model_copy(update={"args": {**VIT.args, "embed_dim": 16}})
    with pytest.raises(RunError, match=r"weights of another vit_tiny_patch16_224: .*size mismatch"):
        classifier(smaller, SIZE, 10, begin.weights)


def test_rates_fall_towards_the_input_and_vectors_do_not_decay() -> None:
    model = classifier(VIT, SIZE, 10, start(VIT).weights)
    groups = layerwise_groups(model, 0.5)
    scales = {name: (g.lr_scale, g.weight_decay_scale) for g in groups for name, _ in g.parameters}
    assert set(scales) == {name for name, p in model.named_parameters() if p.requires_grad}
    # Table of MAE's code: layer i of L has decay^(L - i); the head is layer L = depth + 1.
    assert scales["head.weight"] == (1.0, 1.0)
    assert scales["blocks.1.mlp.fc1.weight"] == (0.5, 1.0)
    assert scales["blocks.0.mlp.fc1.weight"] == (0.25, 1.0)
    assert scales["patch_embed.proj.weight"] == (0.125, 1.0)
    assert scales["blocks.1.mlp.fc1.bias"] == (0.5, 0.0)
    assert scales["pos_embed"] == (0.125, 0.0)


def test_mixing_blends_targets_as_it_blends_images() -> None:
    np.random.seed(0)
    images, labels = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    images[:2] = 1.0
    blended, target = mixing(4, mixup=0.8, cutmix=0.0, label_smoothing=0.0)(images, labels)
    share = float(blended[0, 0, 0, 0])  # of the sample itself; the rest is its partner's, which is black
    assert 0 < share < 1
    torch.testing.assert_close(target[0], torch.tensor([share, 0.0, 0.0, 1 - share]))
    assert float(images[0].min()) == 1.0, "what was given stays as it was"
    same, smooth = mixing(4, mixup=0.0, cutmix=0.0, label_smoothing=0.1)(images, labels)
    assert torch.equal(same, images)
    torch.testing.assert_close(smooth[0], torch.tensor([0.925, 0.025, 0.025, 0.025]))


def test_few_labels_are_learnt_repeatably_and_nothing_else_is_touched(digits: Path) -> None:
    train, val = (digits / split / "manifest.json" for split in ("train", "val"))
    begin = start(RESNET)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = float(torch.rand(1)), random.random(), float(np.random.rand())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    learnt = few_shot_accuracy(begin, train, val, recipe(60), shots=8, draw=0)
    assert (float(torch.rand(1)), random.random(), float(np.random.rand())) == expected
    assert learnt > 30, "chance is 10"
    assert few_shot_accuracy(begin, train, val, recipe(2), shots=8, draw=0) < learnt


def test_the_same_seed_gives_the_same_network(digits: Path, tmp_path: Path) -> None:
    few = write_subset(Manifest.load(digits / "train"), range(40), tmp_path / "few").path
    one, other, third = (
        fine_tune(start(RESNET), few, recipe(3), seed=seed).state_dict() for seed in (5, 5, 6)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["fc.weight"], third["fc.weight"])


def test_a_set_without_classes_is_refused(digits: Path, tmp_path: Path) -> None:
    few = write_subset(Manifest.load(digits / "train"), range(4), tmp_path / "few")
    Manifest(few.directory, few.shards, few.fields, (), few.about).save()
    with pytest.raises(DataError, match="no class names"):
        fine_tune(start(RESNET), few.path, recipe(2))


def test_a_name_from_scratch_needs_no_network_and_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one, same, other = (start_of("test_vit", scratch=True, seed=seed) for seed in (1, 1, 2))
    assert one.encoder.name == "test_vit" and one.image_size == (160, 160)
    assert all(torch.equal(value, same.weights[name]) for name, value in one.weights.items())
    assert not torch.equal(one.weights["patch_embed.proj.weight"], other.weights["patch_embed.proj.weight"])


def test_a_recipe_may_pool_otherwise_than_the_source() -> None:
    begin = start_of("test_vit", scratch=True, pooling="avg")
    model: Any = classifier(begin.encoder, begin.image_size, 3, begin.weights)
    assert begin.encoder.pooling == model.global_pool == "avg"
    assert isinstance(model.fc_norm, torch.nn.LayerNorm)


SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
HEADLESS = {**SMALL, "class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize(
    ("name", "args", "pooling"),
    [
        ("vit_tiny_patch16_224", HEADLESS, "token"),  # as moco_v3 trains a ViT without class token
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}, "token"),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, "token"),
        ("resnetv2_18", {}, "token"),
        ("densenet121", {"block_config": (1, 1), "growth_rate": 8}, "token"),
        ("mobilenetv3_small_050", {}, "token"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "token"),
    ],
)
def test_every_encoder_becomes_a_classifier_from_itself_and_from_its_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, args: dict[str, Any], pooling: str
) -> None:
    size = (28, 28) if "14_" in name else SIZE
    config = EncoderConfig(name=name, args=args, pooling=pooling)
    torch.manual_seed(0)
    encoder = encoders.build(config, size).eval()
    view = ViewSpec(size=size, crop=CenterCrop(0.9), flip=0.0)
    monkeypatch.setattr(timm_folder, "verify", lambda *given: 0.0)
    timm_folder.write(timm_folder.Backbone(encoder, config, view), tmp_path / "export")
    images = torch.randn(2, 3, *size)
    for begin in (Start(config, size, encoder.state_dict()), start_of(str(tmp_path / "export"))):
        model = classifier(begin.encoder, size, 7, begin.weights).eval()
        assert model(images).shape == (2, 7)
        hidden = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        if not isinstance(hidden, tuple):
            torch.testing.assert_close(hidden.flatten(1), encoder(images))


def test_where_there_is_no_drop_path_it_is_said() -> None:
    config = EncoderConfig(name="densenet121", args={"block_config": (1, 1), "growth_rate": 8})
    begin = Start(config, SIZE, encoders.build(config, SIZE).state_dict())
    with pytest.raises(
        ConfigError, match=r"^drop_path: found 0\.1, and densenet121 has none; set drop_path=0$"
    ):
        classifier(config, SIZE, 7, begin.weights, drop_path=0.1)


@pytest.mark.parametrize("size", [48, (32, 64)])
def test_at_another_size_positions_are_resampled(tmp_path: Path, size: Any) -> None:
    torch.manual_seed(0)
    encoder = encoders.build(VIT, SIZE)
    timm.models.save_for_hf(
        encoder, tmp_path / "folder", safe_serialization=True,
        model_args={**VIT.args, "img_size": SIZE, "global_pool": "avg", "fc_norm": False},
    )  # fmt: skip
    begin = start_of(str(tmp_path / "folder"), image_size=size)
    shape = size if isinstance(size, tuple) else (size, size)
    assert begin.image_size == begin.view(Augmentation()).size == shape
    assert begin.weights["pos_embed"].shape[1] == 1 + shape[0] // 8 * (shape[1] // 8)
    assert torch.equal(begin.weights["pos_embed"][:, 0], encoder.state_dict()["pos_embed"][:, 0])
    model = classifier(begin.encoder, begin.image_size, 3, begin.weights)
    assert model(torch.randn(1, 3, *shape)).shape == (1, 3)
    with pytest.raises(ConfigError, match=r"^image_size: 36 x 36 pixels aren't whole patches"):
        start_of(str(tmp_path / "folder"), image_size=36)
