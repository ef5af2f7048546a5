"""Zero-shot classification: an image belongs to the class whose name, put into sentences, is nearest to it.

Radford et al. 2021 (arXiv:2103.00020 §3.1): each class is the mean of its prompts' unit embeddings, made unit
again. For models that embed images and texts alike; nothing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import pydantic
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError, DataError
from data_pipeline.classes import read_classes
from data_pipeline.hashing import Int64s
from data_pipeline.manifest import Manifest
from data_pipeline.types import Batch
from pretrain.judging.features import NotFiniteError
from pretrain.judging.image_text import image_text, text_embeddings
from pretrain.judging.subject import Evaluator, EvaluatorConfig, Subject, mean_over_set
from pretrain.ports import Scores

_ILL = "not finite"


class ZeroShotConfig(EvaluatorConfig):
    """Prompts, and names for the classes. `data` is judged; of a folder with train and val, val."""

    needs_labels: ClassVar[bool] = True

    kind: str = "zero_shot"
    templates: tuple[str, ...] | Path = ("a photo of a {}.",)  # with {} for the name; or a file, one a line
    classes: Path | None = None  # a JSON list or a line for each label; None: as the manifest names them

    @pydantic.field_validator("templates")
    @classmethod
    def _with_a_place(cls, templates: tuple[str, ...] | Path) -> tuple[str, ...] | Path:
        if not isinstance(templates, Path):
            _require_places(templates)
        return templates

    def manifests(self) -> list[Path]:
        """The judged one: nothing is learnt from labels."""
        return super().manifests()[-1:]

    def placed(self) -> Self:
        """The same with absolute paths."""
        update = {
            name: path.expanduser().absolute()
            for name in ("templates", "classes")
            if isinstance(path := getattr(self, name), Path)
        }
        return super().placed().model_copy(update=update)

    def require_possible(self, objective: nn.Module) -> None:
        """Refuse an objective without a text tower. Raises `ConfigError`."""
        image_text(objective, self.title)

    def require_data(self) -> None:
        """Refuse unlabelled data, and prompts or names that can't be read or don't match."""
        super().require_data()
        [path] = self.manifests()
        self.prompts(), self.names(Manifest.load(path))

    def _require_labels(self, manifest: Manifest, found: Sequence[Int64s]) -> None:
        names = self.names(manifest)
        if found and (highest := int(found[-1].max())) >= len(names):
            raise DataError(f"{manifest.path}: has label {highest}, but only {len(names)} classes are named")

    def figures(self) -> tuple[str, ...]:
        """See `EvaluatorConfig.figures`."""
        return ("top1", "top5")

    def build(self) -> Evaluator:
        return ZeroShot(self)

    def prompts(self) -> Sequence[str]:
        """Raises `ConfigError` where the file can't be read or a line has no place for the name."""
        if not isinstance(self.templates, Path):
            return self.templates
        lines = _read(self.templates, f"evaluate.{self.title}.templates").splitlines()
        found = [line.strip() for line in lines if line.strip()]
        try:
            _require_places(found)
        except ValueError as error:
            raise ConfigError(f"evaluate.{self.title}.templates: {self.templates}: {error}") from None
        return found

    def names(self, manifest: Manifest) -> Sequence[str]:
        """What each label is called. Raises `ConfigError` or `DataError`, also where a label has no name."""
        names = self._names(manifest)
        labels: dict[str, int] = {}
        for number, name in enumerate(names):
            if name != name.encode(errors="replace").decode():  # of a folder in another encoding
                raise ConfigError(
                    f"evaluate.{self.title}.classes: {self.classes or manifest.path}: label {number} is "
                    f"called {name!a}, which isn't UTF-8 text; give a file with a name for each label"
                )
            if labels.setdefault(name, number) != number:
                raise ConfigError(
                    f"evaluate.{self.title}.classes: {self.classes or manifest.path}: labels {labels[name]} "
                    f"and {number} are both called {name!r}, which no prompt can tell apart; name each label "
                    "differently"
                )
        if manifest.classes and len(names) != len(manifest.classes):
            raise ConfigError(
                f"evaluate.{self.title}.classes: {self.classes} names {len(names)} classes, "
                f"{manifest.path} has {len(manifest.classes)}; give a name for each label, in their order"
            )
        return names

    def _names(self, manifest: Manifest) -> Sequence[str]:
        if self.classes is None:
            if not manifest.classes:
                raise DataError(
                    f"{manifest.directory}: its manifest names no classes; give "
                    f"evaluate.{self.title}.classes a file with a name for each label"
                )
            return manifest.classes
        where = f"evaluate.{self.title}.classes"
        if self.classes.suffix != ".json":
            try:
                return read_classes(self.classes)
            except DataError as error:
                raise ConfigError(f"{where}: {error}") from None
        try:
            names = json.loads(_read(self.classes, where))
        except ValueError:
            raise ConfigError(f"{where}: {self.classes}: isn't JSON") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{where}: {self.classes}: has to be a list of names, the first of label 0")
        return names


def _require_places(templates: Sequence[str]) -> None:
    wrong = next((template for template in templates if template.count("{}") != 1), None)
    if wrong is not None or not templates:
        raise ValueError(f"found {wrong!r}; each template has one {{}} where the name goes")


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "isn't UTF-8"
        raise ConfigError(f"{where}: {path}: can't be read: {told}") from error


@dataclass(frozen=True)
class ZeroShot:
    config: ZeroShotConfig

    def __call__(self, subject: Subject) -> Scores:
        title, [path] = self.config.title, self.config.manifests()
        objective, manifest = image_text(subject.objective, title), Manifest.load(path)
        self.config.require_data()
        names, templates = self.config.names(manifest), self.config.prompts()
        classes = self.class_embeddings(subject, names, templates)

        def judge(batch: Batch) -> dict[str, Tensor]:
            assert batch.target is not None
            if int(batch.target.max()) >= len(
                names
            ):  # of a remote set, whose labels weren't looked at before
                raise DataError(
                    f"{path}: has label {int(batch.target.max())}, but only {len(names)} classes are named"
                )
            embedded = objective.embed_images(batch.views[0])
            ranking = (embedded @ classes.T).topk(min(5, len(names))).indices
            right = ranking == batch.target[:, None]
            found = {"top1": 100.0 * right[:, 0].float().mean(), _ILL: (~embedded.isfinite()).float().sum()}
            if len(names) > 5:
                found["top5"] = 100.0 * right.any(dim=1).float().mean()
            return found

        values = mean_over_set(subject, path, judge)
        if values.pop(_ILL):
            raise NotFiniteError(
                f"{path}: embeddings of images aren't finite numbers: training has diverged; judge an "
                "earlier checkpoint (--step), or train with a lower rate"
            )
        return Scores(title, values, {"classes": len(names), "templates": len(templates)})

    def class_embeddings(self, subject: Subject, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """(C, D) float32 of unit length: the mean over templates, of units, made unit again."""
        texts = [template.replace("{}", name) for name in names for template in templates]
        embedded = text_embeddings(subject, texts, self.config.title)
        return functional.normalize(embedded.view(len(names), len(templates), -1).mean(dim=1), dim=1)
