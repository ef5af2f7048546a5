"""What an evaluator judges: a frozen encoder at one instant, and its features of labelled sets."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from configs.errors import DataError
from configs.loading import Config
from data_pipeline.load import sequential
from data_pipeline.manifest import Manifest
from data_pipeline.read import LABEL_FIELDS
from data_pipeline.tokenize import Tokenizer
from data_pipeline.transform import device_half
from data_pipeline.types import Batch, CenterCrop, ViewSpec
from pretrain import collectives
from pretrain.evaluators.features import Features, fixed_fifth
from pretrain.types import Duration, Objective, Scores

Advance = Callable[[int], None]
"""Called with the number of samples just encoded, for progress bars."""


@dataclass(frozen=True)
class Subject:
    """A model as it is at one instant. Looking leaves its mode, gradients and all random state as they were.

    Features are computed once per set however many evaluators ask.
    """

    encoder: nn.Module
    encode: Callable[[Tensor], Tensor]  # (B, channels, H, W) normalised float32 -> (B, D)
    view: ViewSpec  # how an image is shown to the encoder
    device: torch.device
    objective: Objective | None = None  # where the encoder is still in its pretext task
    batch_size: int = 256
    workers: int = 0
    advance: Advance | None = None
    tokenizer: Tokenizer | None = None  # of the run's captions, where it has any
    _seen: dict[Path, Features] = field(default_factory=dict, repr=False, compare=False)

    def features(self, manifest: Path) -> Features:
        """Frozen features of every sample of `manifest`. Collective: all ranks call it together."""
        if manifest not in self._seen:
            self._seen[manifest] = self._extract(manifest)
        return self._seen[manifest]

    def _extract(self, manifest: Path) -> Features:
        values, labels = [], []
        with self.looking():
            for batch in self.batches(manifest):
                values.append(self.encode(batch.views[0]).float())
                labels.append(torch.full_like(batch.index, -1) if batch.target is None else batch.target)
        own = torch.cat(values) if values else self._no_features()
        target = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64, device=self.device)
        return Features(collectives.gather_uneven(own), collectives.gather_uneven(target))

    def batches(self, manifest: Path) -> Iterator[Batch]:
        """The rank's own contiguous part of the set in its own order, normalised, on the device."""
        rank, size = collectives.rank(), collectives.ranks()
        for batch in sequential(
            manifest, self.view, batch_size=self.batch_size, rank=rank, world_size=size, workers=self.workers
        ):
            yield self.shown(batch)
            if self.advance is not None:
                self.advance(len(batch))

    def shown(self, batch: Batch) -> Batch:
        """A batch of the loader's as the encoder is shown it: normalised, on the device."""
        return device_half([self.view])(batch.to(self.device))

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Evaluation mode without gradients; afterwards everything is as before, also on an error."""
        with undisturbed(self.objective or self.encoder, self.device), torch.no_grad():
            yield

    def _no_features(self) -> Tensor:
        """What a rank without samples adds: (0, D)."""
        blank = torch.zeros(1, self.view.channels, *self.view.size, device=self.device)
        with self.looking():
            return self.encode(blank).float()[:0]


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """`module` in evaluation mode; puts back every sub-module's mode and all random state of the process."""
    modes = [(part, part.training) for part in module.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            module.eval()
            yield
        finally:
            for part, training in modes:
                part.training = training
            random.setstate(python)
            np.random.set_state(numpy)


def evaluation_view(training: ViewSpec, fraction: float = 0.875) -> ViewSpec:
    """The plain, centred counterpart of a training view: its size, resampling, channels and normalisation.

    `fraction` is what the crop keeps of the shorter side (timm's crop_pct).
    """
    return ViewSpec(
        size=training.size,
        crop=CenterCrop(fraction),
        interpolation=training.interpolation,
        flip=0.0,
        mean=training.mean,
        std=training.std,
        grey=training.grey,
    )


class RawPixels(nn.Module):
    """The features nobody had to learn: (B, 3, H, W) -> (B, 3*H*W) normalised pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Evaluator(Protocol):
    """Judges a frozen model. Collective: every rank calls it and gets the same scores."""

    def __call__(self, subject: Subject) -> Scores: ...


class EvaluatorConfig(Config, ABC):
    """Settings of one evaluation. `kind` "knn" is `evaluators/knn.py`.

    `data` is what the model is judged on: a labelled manifest, or a folder with `train/manifest.json` to
    learn from and `val/manifest.json` to be judged on. Given one manifest and no `labelled`, a fixed fifth of
    each class is judged and the rest learnt from, so that a run, an export and a timm model are judged alike.
    """

    needs_labels: ClassVar[bool] = False

    kind: str
    name: str | None = None  # under which the scores are logged; the kind where it isn't given
    every: Duration | None = None  # how often during training; without it only at the end
    data: Path
    labelled: Path | None = None  # manifest whose labels the evaluator may learn from

    @pydantic.field_validator("every")
    @classmethod
    def _same_on_every_rank(cls, every: Duration | None) -> Duration | None:
        if every is not None and (every.unit == "min" or every.amount == 0):
            raise ValueError('evaluations come every so many steps, samples or epochs, such as "10 epochs"')
        return every

    @property
    def title(self) -> str:
        return self.name or self.kind

    def placed(self) -> Self:
        """The same with absolute paths, so that it means the same from any working directory."""
        labelled = None if self.labelled is None else self.labelled.expanduser().absolute()
        return self.model_copy(update={"data": self.data.expanduser().absolute(), "labelled": labelled})

    def require_possible(self, objective: nn.Module) -> None:
        """Refuse a run whose objective can't be judged so, before it starts. Raises `ConfigError`.

        `objective` may be on the meta device.
        """

    def require_data(self) -> None:
        """Refuse data that can't be used, before a run starts or a model is opened. Raises `UserError`."""
        loaded = {path: Manifest.load(path) for path in self.manifests()}
        for path, manifest in loaded.items():
            if self.needs_labels and not set(LABEL_FIELDS) & set(manifest.fields):
                raise DataError(f"{path}: has no class labels, which {self.title} needs")
        (learn, first), (judge, last) = next(iter(loaded.items())), list(loaded.items())[-1]
        if self.needs_labels and first.classes and last.classes and first.classes != last.classes:
            raise DataError(
                f"{judge}: its {len(last.classes)} classes aren't the {len(first.classes)} of {learn}, which "
                f"{self.title} learns from; index both with the same --classes"
            )

    @abstractmethod
    def build(self) -> Evaluator: ...

    def learn_and_judge(self, subject: Subject) -> tuple[Features, Features]:
        """Features to learn from and features to be judged on. Raises `DataError` where one has no labels."""
        self.require_data()
        *learn, judge = self.manifests()
        if not learn:
            return fixed_fifth(subject.features(judge))
        return subject.features(learn[0]), subject.features(judge)

    def manifests(self) -> list[Path]:
        """The manifests it reads: to learn from (where it isn't part of the other), to be judged on."""
        learn, judge = self.labelled, self.data
        if judge.is_dir():
            inside = judge / "manifest.json"
            if not inside.is_file():
                learn, inside = learn or judge / "train/manifest.json", judge / "val/manifest.json"
            judge = inside
        return [judge] if learn is None else [learn, judge]


def mean_over_set(
    subject: Subject, manifest: Path, judge: Callable[[Batch], Mapping[str, Tensor]]
) -> dict[str, float]:
    """Means over a whole set of what `judge` gives as means over a batch: name -> () tensor.

    Batches weigh as many samples as they hold; sums are kept in float64.
    """
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64, device=subject.device)
    with subject.looking():
        for batch in subject.batches(manifest):
            for name, value in judge(batch).items():
                sums[name] = sums.get(name, torch.zeros_like(count)) + value.double() * len(batch)
            count += len(batch)
    samples = collectives.total(count)
    return {
        name: float(collectives.total(sums.get(name, torch.zeros_like(count))) / samples)
        for name in collectives.union(sums)
    }
