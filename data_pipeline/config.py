"""What a run's config says of its data: YAML key `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from configs.errors import ConfigError
from configs.loading import Config
from data_pipeline.cache import CacheConfig
from data_pipeline.decode import MAX_PIXELS
from data_pipeline.demo import DemoConfig
from data_pipeline.stream import StreamConfig
from data_pipeline.tokenize import TokenizerConfig

_SIDES = "a side or [height, width], in pixels"


class SourceConfig(Config):
    """One more data set to draw from, in YAML under `data.also`."""

    manifest: Path
    weight: PositiveFloat = 1.0  # share of the samples, relative to the other sources' weights
    max_epochs: PositiveFloat | None = None  # the run stops before it repeats the source more often


class DataConfig(Config):
    """YAML key `data`. Sources, `streams` and `window` fix the order of samples: no change within a run.

    Either `manifest` or `stream`.
    """

    manifest: Path | None = None
    stream: StreamConfig | None = None  # unindexed tars, with a weaker guarantee: see the module `stream`
    weight: PositiveFloat = 1.0  # of the manifest, against those in `also`
    max_epochs: PositiveFloat | None = None
    also: tuple[SourceConfig, ...] = ()
    demo: DemoConfig | None = None  # made at the manifest's place when missing
    image_size: int | tuple[int, int] = Field(224, description=_SIDES)
    tokenizer: TokenizerConfig | None = None  # for objectives that read captions
    captions: tuple[str, ...] = Field(("txt",), min_length=1)  # fields, or keys of JSON fields: json.captions
    workers: NonNegativeInt = 2  # processes of each rank; 0 reads in the training process
    prefetch: PositiveInt = 3  # batches being made ahead
    streams: PositiveInt = 64  # shards read from at a time, over all ranks
    window: PositiveInt = 4096  # samples of a stream that are shuffled together
    max_pixels: PositiveInt = MAX_PIXELS  # larger pictures are refused: a guard against decompression bombs
    max_broken: float = Field(0.001, ge=0, le=1)  # share of samples that may be replaced before the run stops
    resize: Literal["exact", "fast"] = "exact"  # fast: OpenCV's bilinear without antialiasing
    cache: CacheConfig | None = None  # needed for shards behind URLs

    @model_validator(mode="after")
    def _one_kind(self) -> DataConfig:
        if (self.manifest is None) == (self.stream is None):
            raise ValueError("set one of manifest (indexed shards: keel data index) and stream (others)")
        indexed = {"also": self.also, "demo": self.demo, "max_epochs": self.max_epochs, "cache": self.cache}
        for name, value in indexed.items():
            if self.stream is not None and value:
                raise ValueError(
                    f"{name} is for indexed shards and has no meaning beside stream; leave it out"
                )
        return self

    @property
    def first_manifest(self) -> Path:
        """`manifest`, where it can't be done without. Raises `ConfigError` in stream mode."""
        if self.manifest is None:
            raise ConfigError("data.manifest: is missing, and data.stream can't stand in for it here; set it")
        return self.manifest

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All data sets, the manifest first; none in stream mode."""
        if self.manifest is None:
            return ()
        first = SourceConfig(manifest=self.manifest, weight=self.weight, max_epochs=self.max_epochs)
        return (first, *self.also)

    def placed(self) -> DataConfig:
        """The same with absolute paths."""

        def absolute(path: Path) -> Path:
            return path.expanduser().absolute()

        also = tuple(one.model_copy(update={"manifest": absolute(one.manifest)}) for one in self.also)
        tokenizer = self.tokenizer.placed() if self.tokenizer else None
        manifest = absolute(self.manifest) if self.manifest else None
        return self.model_copy(update={"manifest": manifest, "also": also, "tokenizer": tokenizer})
