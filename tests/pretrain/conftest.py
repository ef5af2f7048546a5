"""The digits, packed once, and subjects to judge on them."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.types import CenterCrop, ViewSpec
from pretrain.judging.subject import RawPixels, Subject

VIEW = ViewSpec(size=(32, 32), crop=CenterCrop(1.0), flip=0.0)


@pytest.fixture
def pixels() -> Subject:
    """Raw pixels as features."""
    module = RawPixels()
    return Subject(module, module, VIEW, torch.device("cpu"))
