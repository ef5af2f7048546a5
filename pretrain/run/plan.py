"""A run's config with the facts of its data: all that can be known before a process group starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError
from data_pipeline.facts import Facts, facts_of
from data_pipeline.load import Loader, build_loader
from data_pipeline.stream import StreamLoader
from data_pipeline.types import ViewSpec
from pretrain import encoders
from pretrain.accumulation import require_called
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.objective import BuildContext, Objective


@dataclass(frozen=True)
class Plan:
    """What a config comes to with its data."""

    config: RunConfig
    data: Facts
    image_size: tuple[int, int]
    total_steps: int

    @classmethod
    def of(cls, config: RunConfig) -> Plan:
        """Raises `UserError` where a manifest or a tokenizer can't be used."""
        data = facts_of(config.data)
        size = config.data.image_size
        return cls(
            config=config,
            data=data,
            image_size=size if isinstance(size, tuple) else (size, size),
            total_steps=config.train.duration.steps(config.train.batch_size, data.samples),
        )

    @property
    def samples(self) -> int:
        """Size of one epoch: of all sources together."""
        return self.data.samples

    @property
    def views(self) -> Sequence[ViewSpec]:
        return self.config.views(self.image_size)

    def require_different_samples(self) -> None:
        """Refuse a set too small for what the objective compares at a time. Raises `ConfigError`."""
        compared = self.config.objective.compared(self.config.train.batch_size)
        if (count := sum(compared.values())) > self.samples:
            settings = " + ".join(f"{name} ({number})" for name, number in compared.items())
            raise ConfigError(
                f"{settings}: {count} samples are compared at a time, and the data have {self.samples}: an "
                "image would be its own negative; use fewer, or more data"
            )

    def start(self) -> Progress:
        return Progress(0, 0, self.total_steps, self.samples)

    def loader(
        self, rank: int, world_size: int, position: int, quarantine: Path | None = None
    ) -> Loader | StreamLoader:
        """A rank's share of the data from a position on."""
        config = self.config
        return build_loader(
            config.data,
            self.views,
            needs=config.objective.needs,
            seed=config.run.seed,
            batch_size=config.train.batch_size,
            rank=rank,
            world_size=world_size,
            position=position,
            quarantine=quarantine,
        )

    def objective(self, world_size: int = 1) -> Objective:
        """The objective with random weights, from torch's current generator and on its current device."""
        config, tokenizer = self.config, self.data.tokenizer
        context = BuildContext(
            encoder=encoders.build(config.encoder, self.image_size),
            image_size=self.image_size,
            dataset_size=self.samples,
            batch_size=config.train.batch_size,
            autocast=config.train.autocast,
            world_size=world_size,
            accumulation=config.micro_batch(world_size)[1],
            vocabulary=tokenizer.vocabulary if tokenizer else None,
            text_length=tokenizer.context if tokenizer else None,
        )
        objective = config.objective.build(context)
        require_called(objective)
        return objective
