"""Schedules as pure functions of progress: of rates, of weight decay and of a teacher's momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

ScheduleName = Literal["cosine", "step", "constant"]
WarmupStart = Literal["zero", "one"]


def warmup_then(
    name: ScheduleName,
    step: int,
    total: int,
    warmup: int,
    peak: float,
    final: float = 0.0,
    first: WarmupStart = "zero",
) -> float:
    """Value at `step` (0-based, before the update): linear over `warmup` steps, then the named shape.

    `first`: whether the warm-up's steps take 0, 1, ... of its equal parts, as in facebookresearch/mae and
    moco-v3, or 1, 2, ... as in open_clip (open_clip_train/scheduler.py `_warmup_lr`).
    cosine: half a period from `peak` to `final` over the rest (SGDR, arXiv:1608.03983 eq. 5 with one period,
    as facebookresearch/mae util/lr_sched.py does); constant and step: `peak`.
    """
    if step < warmup:
        return peak * (step + (first == "one")) / warmup
    if name != "cosine" or total <= warmup:
        return peak
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def half_cosine(fraction: float, start: float, end: float) -> float:
    """From `start` to `end` along half a period of a cosine, as `fraction` goes from 0 to 1.

    A teacher's momentum (BYOL, arXiv:2006.07733 §3.3), a growing weight decay (DINO, arXiv:2104.14294 §3.2).
    """
    return end - (end - start) * (math.cos(math.pi * fraction) + 1) / 2


def dropped(step: int, milestones: Sequence[int], factor: float) -> float:
    """Product of `factor` over the milestones that have been reached: the step schedule (MoCo v1, ResNet)."""
    return factor ** sum(step >= milestone for milestone in milestones)
