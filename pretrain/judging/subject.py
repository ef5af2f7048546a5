"""What an evaluator judges: a frozen encoder at one instant, and its features of labelled sets."""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from data_pipeline.hashing import Int64s
from data_pipeline.labels import labels_of
from data_pipeline.load import sequential
from data_pipeline.manifest import Manifest
from data_pipeline.tokenize import Tokenizer
from data_pipeline.transform import device_half
from data_pipeline.types import Batch, CenterCrop, ViewSpec
from pretrain import collectives
from pretrain.clock import Duration
from pretrain.judging.features import Features, fifth_of, fixed_fifth, require_finite
from pretrain.objective import Objective
from pretrain.ports import Scores

log = logging.getLogger(__name__)

_MANY = 100_000  # classes that a vote or a classifier over all of them still bears

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
        """Frozen features of every sample of `manifest`. Collective: all ranks call it together.

        Raises `NotFiniteError`.
        """
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
        found = Features(collectives.gather_uneven(own), collectives.gather_uneven(target))
        require_finite(found.values, f"{manifest}: the encoder's features")
        return found

    def batches(self, manifest: Path) -> Iterator[Batch]:
        """The rank's own contiguous part of the set in its own order, normalised, on the device."""
        rank, size = collectives.rank(), collectives.ranks()
        data = Manifest.load(manifest)
        # Starting workers takes longer than to decode a batch or two.
        workers = self.workers if data.samples > 2 * self.batch_size * size else 0
        for batch in sequential(
            data, self.view, batch_size=self.batch_size, rank=rank, world_size=size, workers=workers
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


@dataclass(frozen=True)
class Labels:
    """Classes of some samples, and what they are called."""

    numbers: Int64s  # (N,)
    classes: Sequence[str]  # of the set; empty where they have no names

    def name(self, number: int) -> str:
        return repr(self.classes[number]) if number < len(self.classes) else f"class {number}"

    def counts(self) -> dict[int, int]:
        """Number of a class -> its samples, for classes that have any."""
        numbers, counts = np.unique(self.numbers, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    def names_of(self, wanted: Callable[[int], bool]) -> list[str]:
        """Classes whose number of samples is `wanted`."""
        return [self.name(number) for number, count in self.counts().items() if wanted(count)]


def several(names: Sequence[str]) -> str:
    """One class, or how many there are and the first few."""
    if len(names) == 1:
        return f"a class ({names[0]})"
    return f"{len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


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
    learns: ClassVar[bool] = False  # from the labels of one part of the data, and is judged on another

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

    def figures(self) -> tuple[str, ...] | None:
        """Names of all scores it can give; None where the objective or the data decide."""
        return None

    def placed(self) -> Self:
        """The same with absolute paths, so that it means the same from any working directory."""
        labelled = None if self.labelled is None else self.labelled.expanduser().absolute()
        return self.model_copy(update={"data": self.data.expanduser().absolute(), "labelled": labelled})

    def require_possible(self, objective: nn.Module) -> None:
        """Refuse a run whose objective can't be judged so, before it starts. Raises `ConfigError`.

        `objective` may be on the meta device.
        """

    def require_data(self) -> None:
        """Refuse data that can't be used, before a run starts or a model is opened. Raises `UserError`.

        Says what can be judged only in part.
        """
        loaded = self._manifests()
        if self.needs_labels and (labels := [labels_of(manifest) for manifest in loaded]):
            self._require_labels(loaded[-1], [each for each in labels if each is not None])

    def _manifests(self) -> list[Manifest]:
        """Those in `manifests()`. Raises `UserError` where one has no labels, or other classes."""
        loaded = {path: Manifest.load(path) for path in self.manifests()}
        for path, manifest in loaded.items():
            if self.needs_labels and not manifest.labelled:
                raise DataError(f"{path}: has no class labels, which {self.title} needs")
        (learn, first), (judge, last) = next(iter(loaded.items())), list(loaded.items())[-1]
        if self.needs_labels and first.classes and last.classes and first.classes != last.classes:
            raise DataError(
                f"{judge}: its {len(last.classes)} classes aren't the {len(first.classes)} of {learn}, which "
                f"{self.title} learns from; pack or index both with the same --classes"
            )
        return list(loaded.values())

    def _require_labels(self, manifest: Manifest, found: Sequence[Int64s]) -> None:
        """`found`: labels of the sets in `manifests()`, as far as they can be known without their shards."""
        if not self.learns or len(found) < len(self.manifests()):
            return
        learn, judge = found[0], found[-1]
        if len(found) == 1:
            learn, judge = (found[0][part] for part in fifth_of(found[0]))
        self._require_learnable(Labels(learn, manifest.classes), Labels(judge, manifest.classes))
        single = Labels(found[0], manifest.classes).names_of(lambda count: count == 1)
        if len(found) == 1 and single:
            log.warning(
                "evaluate.%s: %s: %s with one image only: it is learnt from and not judged",
                *(self.title, manifest.path, several(single)),
            )
        missing = sorted(set(judge.tolist()) - set(learn.tolist()))
        if missing:
            log.warning(
                "evaluate.%s: %s: %s without an image to learn from: each of its images counts as wrong",
                *(
                    self.title,
                    manifest.path,
                    several([Labels(judge, manifest.classes).name(n) for n in missing]),
                ),
            )

    def _require_learnable(self, learn: Labels, judge: Labels) -> None:
        """Refuse labels that it can't learn from. Raises `UserError`. Kinds ask for more."""
        highest = int(max(part.numbers.max(initial=0) for part in (learn, judge)))
        if highest >= max(_MANY, 2 * (len(learn.numbers) + len(judge.numbers))):
            raise DataError(
                f"evaluate.{self.title}: {self.manifests()[-1]}: has labels up to {highest}, more than it "
                "has images: identifiers, for each of which a class would be made; number them anew with "
                "keel data pack --labels-as-names"
            )
        if not len(judge.numbers) or not set(learn.numbers.tolist()) & set(judge.numbers.tolist()):
            raise DataError(
                f"evaluate.{self.title}: {self.manifests()[-1]}: no class has an image to learn from and "
                "another to be judged on; give two images or more of a class, or labelled=MANIFEST to "
                "learn from"
            )

    @abstractmethod
    def build(self) -> Evaluator: ...

    def learn_and_judge(self, subject: Subject) -> tuple[Features, Features]:
        """Features to learn from and features to be judged on. Raises `DataError` where one has no labels."""
        self._manifests()
        *learn, judge = self.manifests()
        judged = subject.features(judge)
        parts = (subject.features(learn[0]), judged) if learn else fixed_fifth(judged)
        classes = Manifest.load(judge).classes
        self._require_learnable(*(Labels(part.labels.cpu().numpy(), classes) for part in parts))
        return parts

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
