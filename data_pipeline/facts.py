"""What is known of a run's data before anything is read from a shard: how many, which, with what words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from configs.errors import ConfigError, DataError
from data_pipeline.account import some
from data_pipeline.cache import check_size
from data_pipeline.captions import TextJob, places
from data_pipeline.config import DataConfig
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Plan, over_cap
from data_pipeline.tokenize import Tokenizer, open_tokenizer

_FIELDS = frozenset({"views", "tokens", "target", "index"})


@dataclass(frozen=True)
class Facts:
    """A run's data, opened. Cheap: manifests and the tokenizer, no shard."""

    config: DataConfig
    manifests: tuple[Manifest, ...]  # none in stream mode
    tokenizer: Tokenizer | None

    @cached_property
    def samples(self) -> int:
        """Size of one epoch: of all sources together, or what a stream is taken to have."""
        if self.config.stream is not None:
            return self.config.stream.samples
        return sum(manifest.samples for manifest in self.manifests)

    @cached_property
    def hash(self) -> str:
        """Identity of the samples, whatever their place; of a stream only its description."""
        if self.config.stream is not None:
            return self.config.stream.hash
        return "+".join(manifest.hash for manifest in self.manifests)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes that a resumed run must find again, under the names they have in run.json."""
        found = {"manifest_hash": self.hash}
        if self.tokenizer is not None:
            found["tokenizer_hash"] = self.tokenizer.hash
        return found

    def place(self, name: str) -> str:
        """The setting and file that a hash of `identity` belongs to."""
        if name == "tokenizer_hash" and self.config.tokenizer is not None:
            return f"data.tokenizer: {self.config.tokenizer.path}"
        return "data.stream" if self.config.stream else f"data.manifest: {self.config.manifest}"

    @property
    def text(self) -> TextJob | None:
        """How captions become tokens; None without a tokenizer. Raises `ConfigError`."""
        if self.tokenizer is None:
            return None
        found = tuple(places(self.config.captions, manifest.fields) for manifest in self.manifests)
        for manifest, leading in zip(self.manifests, found, strict=True):
            if not leading:
                raise ConfigError(
                    f"data.captions: found {', '.join(self.config.captions)}, but {manifest.path} has the "
                    f"fields {some(manifest.fields)}; name one that holds captions, or json.KEY"
                )
        return TextJob(self.tokenizer, found)

    def plan(self, seed: int) -> Plan:
        """The order of a run's data: what the loader follows and an audit replays. Not in stream mode."""
        return make_plan(self.config, self.manifests, seed)

    def require(
        self, needs: frozenset[str], *, world_size: int = 1, seed: int = 0, samples: int | None = None
    ) -> None:
        """Refuse data that can't serve a run of `samples` samples. Raises `ConfigError` or `DataError`.

        Looks at the fields of a batch, caps on repeats, the cache's size, and a stream's number of shards.
        """
        self._require_fields(needs)
        if self.config.stream is not None:
            self.config.stream.require_ranks(world_size)
            return
        plan = self.plan(seed)
        check_size(self.config.cache, self.manifests, [order.shards_in_window() for order in plan.orders])
        if samples is not None:
            self._require_caps(plan, samples)

    def _require_fields(self, needs: frozenset[str]) -> None:
        unknown = needs - _FIELDS
        if unknown:
            raise ValueError(f"no such batch field: {', '.join(sorted(unknown))}")
        for manifest in self.manifests:
            if not any(field in manifest.fields for field in manifest.pictures):
                raise DataError(
                    f"{manifest.path}: has no pictures ({some(manifest.pictures)}); its fields are "
                    f"{some(manifest.fields)}; choose one with keel data index --picture-field"
                )
            if "target" in needs and not manifest.labelled:
                raise DataError(
                    f"{manifest.path}: has no labels (field {manifest.labels[0]}), which the objective "
                    f"needs; its fields are {some(manifest.fields)}; choose one with keel data index "
                    "--label-field"
                )
        if "tokens" in needs and self.text is None:
            raise ConfigError(
                "data.tokenizer: is missing, and the objective reads captions; set "
                "data.tokenizer.path=FILE (keel data tokenizer makes one), or openai"
            )

    def _require_caps(self, plan: Plan, samples: int) -> None:
        caps = [source.max_epochs for source in self.config.sources]
        over = over_cap(plan, caps, samples)
        if over is None:
            return
        name = f"data.also.{over - 1}.max_epochs" if over else "data.max_epochs"
        epochs = plan.counts(samples)[over] / plan.orders[over].samples
        raise ConfigError(
            f"{name}: found {caps[over]:g}, but {samples} samples would take {epochs:.4g} epochs of "
            f"{self.manifests[over].path}; lower its weight or train.duration, or raise it"
        )


def facts_of(config: DataConfig) -> Facts:
    """Open the manifests and the tokenizer. Raises `UserError` in a line."""
    manifests = tuple(Manifest.load(source.manifest) for source in config.sources)
    return Facts(config, manifests, open_tokenizer(config.tokenizer) if config.tokenizer else None)


def make_plan(config: DataConfig, manifests: Sequence[Manifest], seed: int) -> Plan:
    """As `Facts.plan`, for manifests at hand."""
    return Plan(
        [manifest.sizes for manifest in manifests],
        seed=seed,
        streams=config.streams,
        window=config.window,
        weights=[source.weight for source in config.sources],
    )


def vocabulary_of(config: DataConfig) -> int | None:
    """Tokens that the data's tokenizer knows; None without one. Raises `ConfigError`."""
    return open_tokenizer(config.tokenizer).vocabulary if config.tokenizer else None
