"""The digits, packed once, and subjects to judge on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline import demo
from data_pipeline.types import CenterCrop, ViewSpec
from pretrain.judging.subject import RawPixels, Subject

VIEW = ViewSpec(size=(32, 32), crop=CenterCrop(1.0), flip=0.0)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/manifest.json (1,438 images) and val/manifest.json."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    demo.make(demo.DemoConfig(name="digits"), folder)
    return folder


@pytest.fixture
def pixels() -> Subject:
    """Raw pixels as features."""
    module = RawPixels()
    return Subject(module, module, VIEW, torch.device("cpu"))
