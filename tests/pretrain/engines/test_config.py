"""Settings of the engine that can't be met are refused in one line, before any process group starts."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from pretrain import encoders
from pretrain.config import refused_changes
from pretrain.encoders import EncoderConfig
from pretrain.engines.config import EngineConfig


def encoder(name: str = "vit_tiny_patch16_224") -> nn.Module:
    with torch.device("meta"):
        return encoders.build(EncoderConfig(name=name), (224, 224))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "train.precision: fp16 needs a GPU, and none is here; use bf16 or fp32"),
        (
            {"offload": "optimizer", "zero_stage": 0},
            r"train.offload: .* train.zero_stage of 1, 2 or 3, found 0",
        ),
        ({"compile": "blocks", "zero_stage": 3}, r"train.compile: .* train.zero_stage 0, 1 and 2, found 3"),
    ],
)
def test_impossible_pairs(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message) as refusal:
        EngineConfig(**settings).require_possible(encoder())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("here", [True, False])
def test_fp16_is_judged_by_where_it_runs(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    config = EngineConfig(precision="fp16")
    config.require_possible(encoder(), gpu=True)
    with pytest.raises(ConfigError, match="fp16 needs a GPU, and the cluster's gpus_per_node is 0"):
        config.require_possible(encoder(), gpu=False)


@pytest.mark.parametrize("setting", ["activation_checkpointing", "compile"])
def test_a_model_without_blocks(setting: str) -> None:
    value = True if setting == "activation_checkpointing" else "blocks"
    config = EngineConfig.model_validate({setting: value})
    with pytest.raises(ConfigError, match=f"train.{setting}: found no repeated blocks"):
        config.require_possible(encoder("regnety_002"))


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang++" else None)
    EngineConfig(compile="blocks").require_possible(encoder())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.compile: blocks needs a compiler \(g\+\+, c\+\+, clang"):
        EngineConfig(compile="blocks").require_possible(encoder())
    EngineConfig(compile="blocks").require_possible(encoder(), gpu=True)  # nobody knows what is there


def test_what_a_resumed_run_may_change() -> None:
    """Where and when something is computed, but not how exactly."""
    free = ("zero_stage", "activation_checkpointing", "compile", "offload")
    fixed = ("precision", "tf32", "gradient_clip")
    assert free + fixed == tuple(sorted(EngineConfig.model_fields, key=(free + fixed).index))
    changes = {f"train.{name}": (0, 1) for name in free + fixed}
    assert list(refused_changes(changes)) == [f"train.{name}" for name in fixed]
