"""The demo goes all the way through on a few steps, and a second run keeps what is finished."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import UserError
from configs.loading import load
from launch import demo
from pretrain.config import RunConfig

FEW = ["train.duration=6 steps", "optimizer.warmup=2 steps", "checkpoint.every=6 steps", "data.workers=0"]


def run(directory: Path, config: str = "smoke/mae") -> tuple[int, str]:
    printed = io.StringIO()
    code = demo.run(directory, config=config, overrides=FEW, console=Console(file=printed, width=100))
    return code, printed.getvalue()


def test_from_nothing_to_a_backbone_and_once_more(tmp_path: Path) -> None:
    code, printed = run(tmp_path / "demo")
    assert code == 0
    for row in ("raw pixels", "untrained encoder", "pretrained encoder"):
        assert row in printed
    for place in ("metrics.jsonl", "pictures/reconstructions.png", "exports/timm"):
        assert str(tmp_path / "demo" / place) in printed.replace("\n", "")
        assert (tmp_path / "demo" / place).exists()
    assert "largest difference" in printed
    found = json.loads((tmp_path / "demo" / "demo.json").read_text())
    raw, untrained, _ = found["rows"]
    assert raw["few_shot"]["10"] > untrained["few_shot"]["10"] > 20
    errors = found["reconstruction"]
    assert 0 < errors["mean training image"] < errors["mean patch"]

    trained_at = (tmp_path / "demo" / "metrics.jsonl").stat().st_mtime_ns
    code, printed = run(tmp_path / "demo")
    assert code == 0
    assert "is trained already" in printed
    assert (tmp_path / "demo" / "metrics.jsonl").stat().st_mtime_ns == trained_at
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == found


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.yaml").write_text("run: {dir: elsewhere}\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        run(tmp_path / "demo")


def test_the_demo_config_learns_from_digits_alone() -> None:
    config = load("demo/mae", RunConfig)
    assert config.data.demo is not None
    assert config.data.demo.name == "digits"
    assert config.encoder.crop == 1.0, "a digit fills its image: nothing may be cut off when it is judged"
