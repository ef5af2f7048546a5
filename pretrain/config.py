"""A whole run as one frozen value: what `keel train` reads and RUN/config.yaml holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pydantic

from configs.errors import ConfigError
from configs.loading import Config, chosen_by
from data_pipeline.config import DataConfig
from data_pipeline.types import ViewSpec
from pretrain import objectives
from pretrain.checkpoint import CheckpointConfig
from pretrain.clock import Duration
from pretrain.encoders import EncoderConfig
from pretrain.engines.config import Device, EngineConfig, require_devices
from pretrain.evaluators import EvaluatorConfig, evaluator_config_type
from pretrain.health.health import HealthConfig
from pretrain.objective import ObjectiveConfig
from pretrain.optimizers import OptimizerConfig
from pretrain.tracking import TrackConfig

ChosenObjective = pydantic.SerializeAsAny[
    Annotated[ObjectiveConfig, chosen_by("name", objectives.config_type)]
]
ChosenEvaluator = pydantic.SerializeAsAny[
    Annotated[EvaluatorConfig, chosen_by("kind", evaluator_config_type)]
]


class RunSection(Config):
    """Where a run lives and what makes it repeatable."""

    dir: Path  # one run, one folder; training on an existing one resumes it
    seed: int = pydantic.Field(0, ge=0, lt=2**31)
    threads: int = pydantic.Field(1, ge=1)  # CPU threads of a rank, the same for any number of ranks
    device: Device = "auto"  # what ranks compute on; auto: GPUs where there are any


class TrainSection(EngineConfig):
    """How long, how much at once, and how it is computed."""

    duration: Duration
    batch_size: int = pydantic.Field(gt=0)  # global: over all ranks and accumulation
    micro_batch_size: int | None = pydantic.Field(None, gt=0)  # of a rank; None: its whole share at once
    stop_after: Duration | None = None  # leave after this much in one go, as if the time limit had come
    time_limit: Duration | None = None  # minutes: saved and gone before they are over, and to be resumed
    health: HealthConfig = HealthConfig()

    @pydantic.field_validator("time_limit")
    @classmethod
    def _minutes(cls, limit: Duration | None) -> Duration | None:
        if limit is not None and (limit.unit != "min" or limit.amount == 0):
            raise ValueError("a time limit is in minutes: say 90 min")
        return limit

    @pydantic.field_validator("duration")
    @classmethod
    def _countable(cls, duration: Duration) -> Duration:
        if duration.unit == "min" or duration.amount == 0:
            raise ValueError("training lasts a positive number of steps, epochs or samples")
        return duration


class RunConfig(Config):
    """The top-level keys of every training config."""

    run: RunSection
    data: DataConfig
    objective: ChosenObjective
    encoder: EncoderConfig
    optimizer: OptimizerConfig
    train: TrainSection
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: tuple[ChosenEvaluator, ...] = ()
    track: TrackConfig = TrackConfig()

    def placed(self) -> RunConfig:
        """The same run with absolute paths, so that it means the same from any working directory."""
        run = self.run.model_copy(update={"dir": self.run.dir.expanduser().absolute()})
        data = self.data.placed()
        evaluate = tuple(evaluation.placed() for evaluation in self.evaluate)
        changes = {"run": run, "data": data, "encoder": self.encoder.placed(), "evaluate": evaluate}
        return self.model_copy(update=changes)

    def require_devices(self, ranks: int, gpu: bool | None = None) -> None:
        """Refuse what the devices can't do. `gpu`: whether ranks on other machines have one; None: here.

        Raises `ConfigError`.
        """
        require_devices(self.run.device, ranks, gpu)
        self.train.require_device(gpu, self.run.device)

    def views(self, image_size: tuple[int, int]) -> Sequence[ViewSpec]:
        """What the objective asks for, grey where the encoder takes one channel."""
        grey = self.encoder.channels == 1
        return [replace(view, grey=grey) for view in self.objective.views(image_size)]

    @property
    def slow_optimizer(self) -> tuple[str, str] | None:
        """What is slow about the optimizer's place, and what to do; None where nothing is."""
        if self.train.offload is None or self.run.threads > 1:
            return None
        return (
            "train.offload: the optimizer steps on the host by run.threads=1, seconds a step for a ViT-L",
            "set run.threads to the processors that a rank has",
        )

    def micro_batch(self, world_size: int) -> tuple[int, int]:
        """(samples a rank takes at once, micro-batches a step).

        Raises `ConfigError` where the batch can't be cut so.
        """
        batch_size, wanted = self.train.batch_size, self.train.micro_batch_size
        if batch_size % world_size:
            raise ConfigError(
                f"train.batch_size: {batch_size} can't be shared equally by {world_size} ranks; "
                f"use a multiple of {world_size}, such as {-(-batch_size // world_size) * world_size}"
            )
        share = batch_size // world_size
        if wanted is not None and (wanted > share or share % wanted):
            allowed = [n for n in range(1, share + 1) if share % n == 0]
            raise ConfigError(
                f"train.micro_batch_size: {wanted} doesn't divide a rank's share of {share} "
                f"({batch_size} over {world_size} ranks); allowed: {', '.join(map(str, allowed))}"
            )
        micro = wanted or share
        return micro, share // micro


MAY_CHANGE = (
    "run.dir", "run.threads", "run.device", "data.workers", "data.prefetch", "data.manifest", "data.cache",
    "data.tokenizer.path",
    "data.max_broken", "train.micro_batch_size", "train.zero_stage", "train.activation_checkpointing",
    "train.compile", "train.offload", "train.stop_after", "train.time_limit",
    "train.health", "checkpoint", "evaluate", "track",
)  # fmt: skip
"""What a resumed run may change: how it runs, not what it computes. The manifest is compared by its hash."""


def refused_changes(changes: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Those of `configs.loading.difference` that would make a resumed run another run."""

    def allowed(path: str) -> bool:
        return any(path == free or path.startswith(free + ".") for free in MAY_CHANGE)

    return {path: values for path, values in changes.items() if not allowed(path)}
