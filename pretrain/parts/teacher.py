"""A teacher is a copy that follows its student slowly and is never trained."""

from __future__ import annotations

import copy

from torch import nn

from pretrain.schedules import half_cosine


def copy_of(student: nn.Module) -> nn.Module:
    """A teacher equal to `student` now, without gradients; `Update.lerp` moves it after applied steps."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher


def momentum_at(fraction: float, start: float, end: float = 1.0) -> float:
    """Half a cosine from `start` to `end` over training (BYOL, arXiv:2006.07733 §3.3; MoCo v3 alike)."""
    return half_cosine(fraction, start, end)
