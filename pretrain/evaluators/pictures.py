"""Pictures instead of figures: what an encoder makes of a few images of a set that it isn't trained on.

What fits the model is drawn: reconstructions (where the objective draws any), captions against images,
nearest neighbours within the set, attention and principal components of a ViT's patches. They go to
RUN/pictures and to the trackers, on the schedule of any other evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.manifest import Manifest
from data_pipeline.read import CAPTION_FIELDS
from pretrain.judging import sheets
from pretrain.judging.image_text import ImageText
from pretrain.judging.subject import Evaluator, EvaluatorConfig, Subject
from pretrain.ports import Scores


class PicturesConfig(EvaluatorConfig):
    """`data` is what is shown: a manifest, or of a folder with train and val, val; labels aren't needed."""

    kind: str = "pictures"
    count: int = pydantic.Field(8, ge=2, le=64)  # images on a sheet
    neighbours: bool = True  # takes features of the whole set

    def manifests(self) -> list[Path]:
        """The shown one: nothing is learnt from labels."""
        return super().manifests()[-1:]

    def figures(self) -> tuple[str, ...]:
        """See `EvaluatorConfig.figures`."""
        return ()

    def build(self) -> Evaluator:
        return Pictures(self)


@dataclass(frozen=True)
class Pictures:
    config: PicturesConfig

    def __call__(self, subject: Subject) -> Scores:
        [manifest] = self.config.manifests()
        data = Manifest.load(manifest)
        drawn = dict(self._of_objective(subject, manifest, data))
        details: dict[str, Any] = {}
        if "similarities" in drawn:
            # A sheet's font knows few scripts; whoever shows it can write them beside it.
            texts = sheets.captions(manifest, range(min(self.config.count, data.samples)))
            details["captions"] = {"similarities": texts}
        if self.config.neighbours:
            both = (subject.features(manifest),) * 2
            sheet = sheets.neighbours(subject, manifest, manifest, both, most=self.config.count)
            drawn["neighbours"] = _tensor(sheet)
        if sheets.is_drawable(subject.encoder):
            images = sheets.some(subject, manifest, range(min(self.config.count, data.samples))).views[0]
            drawn["attention"] = _tensor(sheets.attention(subject, images))
            drawn["components"] = _tensor(sheets.components(subject, images))
        return Scores(self.config.title, {}, {"drawn": sorted(drawn), **details}, drawn)

    def _of_objective(self, subject: Subject, manifest: Path, data: Manifest) -> Mapping[str, Tensor]:
        if subject.objective is None:
            return {}
        numbers = range(min(self.config.count, data.samples))
        with subject.looking():
            drawn = dict(subject.objective.pictures(sheets.some(subject, manifest, numbers)))
        if isinstance(subject.objective, ImageText) and set(CAPTION_FIELDS) & set(data.fields):
            drawn["similarities"] = _tensor(sheets.similarities(subject, manifest, numbers))
        return drawn


def _tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1).to(torch.float32) / 255
