"""What a person would look at to judge each of the demo's runs: one PNG a run, from images it never saw."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from launch.demo.findings import labelled, subject_of, validation
from pretrain.judging import sheets
from pretrain.judging.image_text import ImageText
from pretrain.judging.subject import Subject
from pretrain.objectives.mae import MAE
from pretrain.run import trained
from pretrain.run.trained import Trained


def draw(model: Trained, directory: Path) -> Path:
    """The picture that fits the run's objective, in `directory`."""
    objective = trained.read_objective(model)
    subject = subject_of(objective, model)
    train = model.config.data.first_manifest
    val, pool = validation(train), labelled(train)
    if isinstance(objective, MAE):
        name, picture = "reconstructions", _reconstructions(subject, val)
    elif isinstance(objective, ImageText):
        labels = torch.cat([batch.target for batch in subject.batches(val) if batch.target is not None])
        name, picture = "similarities", sheets.similarities(subject, val, sheets.one_of_each(labels, 10))
    else:
        found = subject.features(val), subject.features(pool)
        name, picture = "neighbours", sheets.neighbours(subject, val, pool, found)
    directory.mkdir(exist_ok=True)
    to = directory / f"{name}.png"
    picture.save(to)
    return to


def _reconstructions(subject: Subject, val: Path, count: int = 8) -> Image.Image:
    """Unseen images, part of each hidden, and what the model makes of it."""
    assert subject.objective is not None
    with subject.looking():
        batch = sheets.some(subject, val, range(count))
        return sheets.columns(subject.objective.pictures(batch)["reconstructions"], count)
