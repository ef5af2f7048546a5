"""What a plug-in imports: `from pretrain.api import Objective, ObjectiveConfig, ...`.

An objective or an evaluation of somebody else's needs nothing else of keel. What stands here stays, or goes
with a word in the changelog; what doesn't may change at any time.
"""

from __future__ import annotations

from configs.errors import ConfigError, DataError, RunError, UserError
from configs.loading import Config
from data_pipeline.randomness import uniform
from data_pipeline.types import (
    Batch,
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    RandomResizedCrop,
    Solarize,
    ViewSpec,
)
from pretrain import collectives, encoders
from pretrain.accumulation import accumulate_for
from pretrain.clock import Duration, Progress
from pretrain.engines.plain import PlainEngine, PlainUpdate
from pretrain.judging.features import Features
from pretrain.judging.subject import Evaluator, EvaluatorConfig, Subject, mean_over_set
from pretrain.losses import contrastive, reconstruction
from pretrain.objective import (
    BuildContext,
    Embeddings,
    LossOutput,
    Objective,
    ObjectiveConfig,
    ParamGroup,
    Update,
    WholeBatchObjective,
)
from pretrain.optimizers import without_decay_on_vectors
from pretrain.parts import collapse, heads, teacher
from pretrain.parts.augmentation import Augmentation
from pretrain.parts.batch_norm import convert, parse, require_independent_parts
from pretrain.parts.precision import autocast
from pretrain.parts.queue import Queue
from pretrain.ports import Scores, StepSettings

__all__ = [
    "Augmentation",
    "Batch",
    "BuildContext",
    "CenterCrop",
    "ColorJitter",
    "Config",
    "ConfigError",
    "DataError",
    "Duration",
    "Embeddings",
    "Evaluator",
    "EvaluatorConfig",
    "Features",
    "GaussianBlur",
    "LossOutput",
    "Objective",
    "ObjectiveConfig",
    "ParamGroup",
    "PlainEngine",
    "PlainUpdate",
    "Progress",
    "Queue",
    "RandomResizedCrop",
    "RunError",
    "Scores",
    "Solarize",
    "StepSettings",
    "Subject",
    "Update",
    "UserError",
    "ViewSpec",
    "WholeBatchObjective",
    "accumulate_for",
    "autocast",
    "collapse",
    "collectives",
    "contrastive",
    "convert",
    "encoders",
    "heads",
    "mean_over_set",
    "parse",
    "reconstruction",
    "require_independent_parts",
    "teacher",
    "uniform",
    "without_decay_on_vectors",
]
