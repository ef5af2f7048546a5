"""The demo goes all the way through on a few steps, and a second run keeps what is finished."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from configs.errors import UserError
from configs.loading import load
from launch.demo import demo
from launch.demo.findings import Findings, Row, see, table
from pretrain.config import RunConfig
from pretrain.parts.batch_norm import convert

FEW = ["train.duration=6 steps", "optimizer.warmup=2 steps", "checkpoint.every=6 steps", "data.workers=0"]
SMOKE = ("smoke/mae", "smoke/moco", "smoke/clip")


def run(directory: Path, configs: Sequence[str] = SMOKE) -> tuple[int, str]:
    printed = io.StringIO()
    console = Console(file=printed, width=100)
    code = demo.run(directory, configs=configs, overrides=FEW, console=console)
    return code, printed.getvalue()


def test_from_nothing_to_three_backbones_and_once_more(tmp_path: Path) -> None:
    code, printed = run(tmp_path / "demo")
    assert code == 0
    for line in (
        "raw pixels",
        "MAE untrained",
        "MoCo v2 pretrained",
        "CLIP pretrained",
        "largest difference",
    ):
        assert line in printed
    pictures = {"mae": "reconstructions", "moco": "neighbours", "clip": "similarities"}
    found = {}
    for name, picture in pictures.items():
        root = tmp_path / "demo" / name
        for place in (f"pictures/{picture}.png", "exports/timm"):
            assert str(root / place) in printed.replace("\n", "")
            assert (root / place).exists()
        found[name] = json.loads((root / "demo.json").read_text())
    raw, untrained, _ = found["mae"]["rows"]
    assert raw["few_shot"]["10"] > untrained["few_shot"]["10"] > 20
    errors = found["mae"]["reconstruction"]
    assert 0 < errors["mean training image"] < errors["mean patch"]
    raws = [found[name]["rows"][0]["few_shot"] for name in ("mae", "moco")]
    assert raws[0] == pytest.approx(raws[1], abs=1.0), "their views are resampled differently, no more"
    assert 0 <= found["clip"]["rows"][2]["zero_shot"] <= 100
    assert found["moco"]["rows"][2]["zero_shot"] is None

    trained_at = (tmp_path / "demo" / "moco" / "metrics.jsonl").stat().st_mtime_ns
    code, printed = run(tmp_path / "demo")
    assert code == 0
    assert printed.count("is trained already") == 3
    assert (tmp_path / "demo" / "moco" / "metrics.jsonl").stat().st_mtime_ns == trained_at
    for name, before in found.items():
        assert json.loads((tmp_path / "demo" / name / "demo.json").read_text()) == before


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo" / "mae").mkdir(parents=True)
    (tmp_path / "demo" / "mae" / "config.yaml").write_text("run: {dir: elsewhere}\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        run(tmp_path / "demo", ("smoke/mae",))


@pytest.mark.parametrize("name", demo.CONFIGS)
def test_demo_configs_cut_nothing_off_when_judged(name: str) -> None:
    config = load(name, RunConfig)
    assert config.data.demo is not None
    assert config.encoder.crop == 1.0, "digits and shapes fill their images"


def test_raw_pixels_stand_once_for_each_set_of_images() -> None:
    rows = [Row("raw pixels", {1: 60.0}, 90.0), Row("pretrained", {1: 70.0}, 95.0, 77.5)]
    printed = io.StringIO()
    found = [Findings("mae", "digits", rows, {}), Findings("moco", "digits", rows, {})]
    Console(file=printed, width=100).print(table(found))
    assert printed.getvalue().count("raw pixels") == 1
    assert "MoCo v2 pretrained" in printed.getvalue()
    assert "77.5" in printed.getvalue()


def test_an_untrained_encoder_sees_with_the_statistics_of_real_images() -> None:
    torch.manual_seed(0)
    images = [torch.randn(12, 3, 4, 4) * 5 + 2 for _ in range(2)]
    for kind, size in (("rank", 0), ("grouped", 4)):
        layer = convert(nn.Sequential(nn.BatchNorm2d(3)), kind, size).eval()  # type: ignore[arg-type]
        see(layer, images)
        pixels = torch.cat(images)
        norm = layer[0]  # type: ignore[index]
        torch.testing.assert_close(norm.running_mean, pixels.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.running_var.sqrt(), pixels.std((0, 2, 3)), rtol=0.05, atol=0.05)
        assert not norm.training
        assert norm.momentum == 0.1


@pytest.mark.parametrize("width", [20, 79, 200])
def test_the_table_is_whole_whatever_it_is_printed_on(width: int) -> None:
    """A narrow terminal, or a log, for which rich takes 80 columns."""
    rows = [
        Row("raw pixels", {1: 60.0, 5: 61.0, 10: 62.0}, 90.0),
        Row("pretrained", {1: 70.0, 5: 71.0, 10: 72.0}, 95.0, 77.5),
    ]
    printed = io.StringIO()
    demo.show_table([Findings("moco", "digits", rows, {})], Console(file=printed, width=width))
    for word in (
        "images",
        "features",
        "1 label ",
        "5 labels",
        "10 labels",
        "kNN",
        "zero-shot",
        "MoCo v2 pretrained",
    ):
        assert word in printed.getvalue(), printed.getvalue()
    assert "…" not in printed.getvalue()
