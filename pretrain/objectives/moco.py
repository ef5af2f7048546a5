"""Momentum contrast: two views of an image should be nearest to each other among a queue of other images' keys.

He et al. 2019, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722, algorithm 1), and
Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning" (arXiv:2003.04297): v1 and v2 differ in head,
temperature and augmentation alone, which are settings here.

    q = unit(head(encoder(view 1)))        k = unit(head'(encoder'(view 2))), no gradient
    loss = -log  exp(q k / T) / (exp(q k / T) + sum over the queue of exp(q k_j / T))
    after an applied step: encoder' <- m encoder' + (1 - m) encoder, and the step's keys enter the queue

All keys of a global batch are made before its first query, by all ranks together and from permuted images, so that
batch norm can't tell which key belongs to a query; the queue is the one of the step's start for every micro-batch.

Departures: with `batch_norm: grouped:N` the statistics are those of N consecutive samples of the (permuted) global
batch on any number of ranks, so that one process trains as many do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from data_pipeline.types import Batch, RandomResizedCrop, ViewSpec
from pretrain import collectives, encoders, heads, losses, teacher
from pretrain.batch_norm import convert, parse
from pretrain.optimizers import groups_without_decay
from pretrain.precision import autocast
from pretrain.queue import Queue
from pretrain.types import (
    BuildContext,
    LossOutput,
    Objective,
    ObjectiveConfig,
    ParamGroup,
    Prepare,
    Progress,
    Update,
)

KEY_ORDER = 1001
"""Purpose number of the keys' permutation among all that is drawn from a seed."""


class Augmentation(Config):
    """Strengths of the colour changes; the papers' are `v1` and `v2`."""
