"""Encoders beyond the usual ones in whole runs: grey pictures, architectures of one's own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from configs.errors import ConfigError
from configs.loading import load
from data_pipeline.augment import denormalised, normalised
from data_pipeline.types import CenterCrop, ViewSpec
from pretrain import encoders
from pretrain.config import RunConfig
from pretrain.encoders import EncoderConfig, weights
from pretrain.evaluators.knn import KNNConfig
from pretrain.export import timm_folder
from pretrain.export.open import open_timm
from pretrain.export.subject import opener
from pretrain.judging.evaluate import evaluate
from pretrain.judging.subject import evaluation_view
from pretrain.run import starting_weights
from pretrain.run.folder import RunFolder
from pretrain.run.main import prepare
from pretrain.run.plan import Plan
from tests.contract.test_objectives import CLOCK, batch_for
from tests.pretrain.run.test_main import Ranks, config_for, run_on

SHORT = ("train.duration=3 steps", "optimizer.warmup=1 steps", "data.workers=0")


def built(smoke: str, pooling: str) -> Any:
    config = load(f"configs/smoke/{smoke}.yaml", RunConfig, [f"encoder.pooling={pooling}"])
    torch.manual_seed(0)
    encoder = encoders.build(config.encoder, (32, 32))
    return config.objective.build(encoders_context(encoder))


def encoders_context(encoder: torch.nn.Module) -> Any:
    from pretrain.objective import BuildContext

    return BuildContext(encoder, (32, 32), 1000, 8, None)


@pytest.mark.parametrize("smoke", ["clip", "siglip", "moco_v3"])
def test_the_pooling_that_is_judged_is_the_one_that_is_trained(smoke: str) -> None:
    found = {pooling: built(smoke, pooling) for pooling in ("token", "avg")}
    batch = batch_for(smoke)
    losses = {pooling: objective(batch, CLOCK).loss.item() for pooling, objective in found.items()}
    assert losses["token"] != losses["avg"], "the setting was ignored"
    encoder = found["avg"].encoder.eval()
    with torch.no_grad():
        mean = encoder.forward_features(batch.views[0])[:, 1:].mean(1)
        torch.testing.assert_close(encoders.features(encoder, batch.views[0]), mean)
        torch.testing.assert_close(encoder(batch.views[0]), mean)


def test_grey_is_pillows_and_timms() -> None:
    """The same numbers as of a grey picture that timm prepares from the export's settings."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (32, 48, 3), dtype=np.uint8)
    spec = ViewSpec(size=(32, 48), crop=CenterCrop(1.0), grey=True)
    ours = normalised(torch.from_numpy(pixels).permute(2, 0, 1)[None], spec)
    mean, std = spec.statistics
    settings = {
        "input_size": (1, 32, 48),
        "mean": mean,
        "std": std,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    theirs = timm.data.create_transform(**settings)(Image.fromarray(pixels).convert("L"))
    assert ours.shape == (1, 1, 32, 48) and theirs.shape == (1, 32, 48)
    assert (ours[0] - theirs).abs().max() < 0.51 / 255 / std[0]  # Pillow rounds to whole levels
    back = denormalised(ours, spec)
    assert back.shape == (1, 3, 32, 48) and torch.equal(back[:, 0], back[:, 2])
    floats = normalised(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, spec)
    torch.testing.assert_close(floats, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("smoke", ["mae", "moco"])
def test_one_channel_from_training_to_the_reopened_export(
    ranks: Ranks, tmp_path: Path, digits: Path, smoke: str
) -> None:
    config = config_for(
        tmp_path / "run", digits, "encoder.args.in_chans=1", *SHORT,
        f"evaluate=[{{kind: knn, data: {digits}, k: 5}}]", smoke=smoke,
    )  # fmt: skip
    assert len(run_on(ranks, 1, config)) == 3
    result = timm_folder.export(tmp_path / "run", tmp_path / "export")
    assert result.max_difference < 1e-5
    encoder, view = open_timm(str(tmp_path / "export"))
    assert view.grey and encoder(torch.randn(2, 1, 32, 32)).shape == (2, 64)
    assert 'convert("L")' in (tmp_path / "export/README.md").read_text()
    judge = [KNNConfig(kind="knn", data=digits, k=5)]
    run, exported = (evaluate(opener(str(tmp_path / name)), judge)[0].values for name in ("run", "export"))
    assert run == exported


NET = """
import torch
from timm.models import build_model_with_cfg, register_model

class MyNet(torch.nn.Module):
    def __init__(self, width=8, in_chans=3, num_classes=10, **_):
        super().__init__()
        self.num_features = width
        self.conv = torch.nn.Conv2d(in_chans, width, 3, 2, 1)
        self.block = torch.nn.Sequential(torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.GELU())
    def forward(self, x):
        return self.block(self.conv(x)).mean((2, 3))

@register_model
def my_net(pretrained=False, **kwargs):
    return MAKE
"""


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A module that registers my_net, importable by this process and, by PYTHONPATH, by those it starts."""
    name = f"mylab_{abs(hash(request.node.nodeid)) % 10**8}"
    (tmp_path / "site").mkdir()
    make = getattr(request, "param", "build_model_with_cfg(MyNet, 'my_net', pretrained, **kwargs)")
    (tmp_path / f"site/{name}.py").write_text(NET.replace("MAKE", make))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    yield name
    forget(name)


def forget(module: str) -> None:
    """As in a process that never imported it."""
    sys.modules.pop(module, None)
    timm.models._registry._model_entrypoints.pop("my_net", None)


def own(root: Path, digits: Path, module: str) -> RunConfig:
    return config_for(
        root, digits, f"encoder={{imports: [{module}], name: my_net, args: {{width: 12}}}}",
        *SHORT, "objective.batch_norm=shuffle", smoke="moco",
    )  # fmt: skip


def test_an_architecture_of_ones_own_is_exported_and_opened(tmp_path: Path, digits: Path, mylab: str) -> None:
    config = own(tmp_path / "run", digits, mylab)
    prepare(config, world_size=1)
    encoder = encoders.build(config.encoder, (32, 32))
    view = evaluation_view(config.views((32, 32))[0])
    timm_folder.write(
        timm_folder.Backbone(encoder, config.encoder, view), tmp_path / "export"
    )  # by a fresh process
    forget(mylab)
    assert open_timm(str(tmp_path / "export"))[0](torch.randn(2, 3, 20, 20)).shape == (2, 12)
    assert f"import {mylab}" in (tmp_path / "export/README.md").read_text()
    started = encoders.build(config.encoder, (32, 32))
    forget(mylab)
    weights.load(started, str(tmp_path / "export"))
    assert torch.equal(started.state_dict()["conv.weight"], encoder.state_dict()["conv.weight"])


def test_what_a_fresh_process_cannot_import_is_refused_before_training(
    tmp_path: Path, digits: Path, mylab: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own(tmp_path / "run", digits, mylab)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    with pytest.raises(
        ConfigError, match=rf"an export of my_net couldn't be opened .* No module named '{mylab}'"
    ):
        prepare(config, world_size=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        ConfigError, match=r"encoder\.imports: .*no_such_lab can't be imported \(ModuleNotFound"
    ):
        own(tmp_path / "run", digits, "no_such_lab")
    with pytest.raises(ConfigError, match=r"encoder\.name: .*encoder\.imports names"):
        load("configs/smoke/moco.yaml", RunConfig, ["encoder={name: another_net}"])


@pytest.mark.parametrize("mylab", ["MyNet(**kwargs)"], indirect=True)
def test_a_network_that_never_loads_weights_is_refused_before_training(
    tmp_path: Path, digits: Path, mylab: str
) -> None:
    with pytest.raises(ConfigError, match=r"as if its weights weren't loaded; .*build_model_with_cfg"):
        prepare(own(tmp_path / "run", digits, mylab), world_size=1)


@pytest.mark.parametrize(
    ("smoke", "overrides", "told"),
    [
        (
            "moco_v3",
            ["train.batch_size=2048"],
            r"^train\.batch_size \(2048\): 2048 samples .* have 1438: an image",
        ),
        (
            "moco",
            ["objective.queue=1438"],
            r"^objective\.queue \(1438\) \+ train\.batch_size \(32\): 1470 samples",
        ),
    ],
)
def test_a_set_in_which_an_image_would_be_its_own_negative(
    tmp_path: Path, digits: Path, smoke: str, overrides: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare(config_for(tmp_path / "run", digits, *overrides, smoke=smoke), world_size=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        ("{name: resnet18}", "this is ResNet"),
        (
            "{name: vit_base_patch16_siglip_224, args: {depth: 1}}",
            r"attention pooling .*encoder\.pooling=avg",
        ),
        (
            "{name: vit_tiny_patch16_224, args: {depth: 1, global_pool: avg}}",
            "no layer norm behind its last block",
        ),
        ("{name: vit_tiny_patch16_224, args: {depth: 1, pos_embed: none}}", "no table of positions"),
        (
            "{name: vit_tiny_patch16_224, args: {depth: 1, dynamic_img_pad: true, dynamic_img_size: true}}",
            "padded",
        ),
        (
            "{name: vit_tiny_patch16_224, args: {depth: 1, patch_drop_rate: 0.5}}",
            "hides patches a second time",
        ),
        ("{name: vit_tiny_r_s16_p8_224, args: {depth: 1}}", "its patches come from a HybridEmbed"),
        ("{name: eva02_tiny_patch14_224, args: {depth: 1}}", "this is Eva"),
    ],
)
def test_what_cannot_be_masked_is_refused_by_name(
    tmp_path: Path, digits: Path, encoder: str, told: str
) -> None:
    size = "data.image_size=28" if "14_" in encoder else "data.image_size=32"
    config = config_for(tmp_path / "run", digits, size)
    config = config.model_copy(update={"encoder": EncoderConfig.model_validate(yaml.safe_load(encoder))})
    with pytest.raises(ConfigError, match=f"^encoder.name: mae needs a plain .*{told}"):
        prepare(config, world_size=1)


def test_chance_that_belongs_to_ranks_is_said_where_it_is_used(
    tmp_path: Path, digits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for rate in (0.0, 0.1):
        config = config_for(tmp_path / "run", digits, f"encoder.args.drop_path_rate={rate}")
        caplog.clear()
        starting_weights.begin(Plan.of(config).objective(), RunFolder(tmp_path / "run"), config.encoder)
        assert ("drop path (up to 0.1): drawn by each rank" in caplog.text) == bool(rate)
