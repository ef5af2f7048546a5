"""What a demo run learnt: frozen features judged with few labels, and the objective's own measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from data_pipeline.facts import facts_of
from data_pipeline.manifest import Manifest
from data_pipeline.subset import write_subset
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.evaluators.few_shot import FewShotConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.evaluators.zero_shot import ZeroShotConfig
from pretrain.judging.image_text import ImageText
from pretrain.judging.subject import RawPixels, Subject, mean_over_set
from pretrain.losses.reconstruction import masked_patch_loss
from pretrain.objective import Objective
from pretrain.objectives.mae import MAE
from pretrain.parts.batch_norm import GroupedBatchNorm
from pretrain.run import trained
from pretrain.run.trained import Trained

CPU = torch.device("cpu")
PROMPTS = ("a photo of a {}", "there is a {}", "a {}")
"""Short ones: what the captions of the shapes begin like."""

POOL = 4000
"""Labelled images that few-shot probes draw from and neighbours are looked for in, at most."""


@dataclass(frozen=True)
class Row:
    """Frozen features judged by few labels and by neighbours: top-1 accuracy in percent."""

    features: str
    few_shot: Mapping[int, float]  # labels a class -> mean over draws
    knn: float
    zero_shot: float | None = None  # by the class names alone


@dataclass(frozen=True)
class Findings:
    """What one run learnt, measured on images it never saw."""

    objective: str
    data: str
    rows: Sequence[Row]  # raw pixels, the untrained encoder, the pretrained one
    reconstruction: Mapping[str, float]  # mean squared error on hidden patches, by what predicted them


def judge(model: Trained) -> Findings:
    """Raw pixels, the untrained and the pretrained encoder judged alike; MAE's reconstruction."""
    seen = subjects(model)
    train = model.config.data.first_manifest
    rows = [row(name, subject, train) for name, subject in seen.items()]
    reconstruction = {}
    if isinstance(seen["pretrained"].objective, MAE):
        reconstruction = reconstruction_errors(seen["pretrained"], train)
    demo = model.config.data.demo
    return Findings(model.config.objective.name, demo.name if demo else "data", rows, reconstruction)


def subjects(model: Trained) -> dict[str, Subject]:
    """Raw pixels, the untrained and the pretrained encoder, as evaluators see them."""
    pretrained, fresh = trained.read_objective(model), trained.new_objective(model.config).eval()
    calibrate(fresh, model)
    found = {"raw pixels": Subject(pixels := RawPixels(), pixels, model.view, CPU)}
    for name, objective in (("untrained", fresh), ("pretrained", pretrained)):
        found[name] = subject_of(objective, model)
    return found


def subject_of(objective: Objective, model: Trained) -> Subject:
    """An objective's encoder as evaluators see it."""
    encode = partial(encoders.features, objective.encoder)
    tokenizer = facts_of(model.config.data).tokenizer
    return Subject(objective.encoder, encode, model.view, CPU, objective, tokenizer=tokenizer)


def calibrate(fresh: Objective, model: Trained) -> None:
    """Give an untrained encoder's batch norms the statistics of real images.

    Training does so in passing; without it the untrained twin would be judged with blind layers.
    """
    plain = subject_of(fresh, model)
    images = (batch.views[0] for batch in islice(plain.batches(model.config.data.first_manifest), 4))
    see(fresh.encoder, images)


def see(encoder: nn.Module, images: Iterable[Tensor]) -> None:
    """Running statistics of every batch norm become the mean over `images`, batches of (B, 3, H, W)."""
    norms = [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    group = max([norm.size for norm in norms if isinstance(norm, GroupedBatchNorm)], default=1)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in images:
            encoder(batch[: len(batch) // group * group])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def row(name: str, subject: Subject, train: Path) -> Row:
    """Few-shot probe and kNN, learning from `train`, judged on the validation set beside it."""
    val, pool = validation(train), labelled(train)
    probe = FewShotConfig(data=val, labelled=pool)
    few_shot = probe.build()(subject).values
    knn = KNNConfig(data=val, labelled=pool).build()(subject).values["top1"]
    zero_shot = None
    if isinstance(subject.objective, ImageText):
        zero_shot = ZeroShotConfig(data=val, templates=PROMPTS).build()(subject).values["top1"]
    return Row(name, {shots: few_shot[f"top1_at_{shots}"] for shots in probe.shots}, knn, zero_shot)


def validation(manifest: Path) -> Path:
    """The manifest of the demo set's other part."""
    return manifest.parent.parent / "val" / manifest.name


def labelled(train: Path) -> Path:
    """The images whose labels may be learnt from: all of a small set, the first of a large one."""
    data = Manifest.load(train)
    if data.samples <= POOL:
        return train
    to = train.parent.parent / "labelled"
    if not (to / train.name).is_file():
        write_subset(data, range(POOL), to)
    return to / train.name


def reconstruction_errors(subject: Subject, train: Path) -> dict[str, float]:
    """Mean squared error on hidden patches of unseen images, in units of the normalised pixels.

    Against two guesses that need no network: the mean patch, and the mean training image at the same place.
    """
    objective, val = subject.objective, validation(train)
    assert isinstance(objective, MAE)
    total, count = torch.zeros(()), 0
    with subject.looking():
        for batch in subject.batches(train):
            total = total + objective.reconstruct(batch).target.sum(dim=0)
            count += len(batch)
    mean_image = total / count

    def from_mean_image(batch: Batch) -> dict[str, Tensor]:
        _, target, masked = objective.reconstruct(batch)
        return {"mean training image": masked_patch_loss(mean_image.expand_as(target), target, masked)}

    own = mean_over_set(subject, val, objective.judge)
    return {
        "pretrained MAE": own["reconstruction_error"],
        **mean_over_set(subject, val, from_mean_image),
        "mean patch": own["mean_patch_error"],
    }


def table(found: Sequence[Findings]) -> Table:
    """Features down, evaluations across; raw pixels once for each set of images."""
    shots = list(found[0].rows[0].few_shot)
    title = "top-1 % on unseen images (chance 10), by labels a class, neighbours, names alone"
    table = Table(title=title, title_justify="left", title_style="", min_width=len(title))
    for column in ("images", "features"):
        table.add_column(column, no_wrap=True)
    for count in shots:
        table.add_column(f"{count} label" + "s" * (count > 1), justify="right")
    for column in ("kNN", "zero-shot"):
        table.add_column(column, justify="right")
    raw_shown = set[str]()
    for one in found:
        for line in one.rows:
            raw = line.features == "raw pixels"
            if raw and one.data in raw_shown:
                continue
            if raw:
                raw_shown.add(one.data)
            name = line.features if raw else f"{NAMES.get(one.objective, one.objective)} {line.features}"
            figures = [f"{line.few_shot[count]:.1f}" for count in shots] + [f"{line.knn:.1f}"]
            zero = "" if line.zero_shot is None else f"{line.zero_shot:.1f}"
            table.add_row(one.data, name, *figures, zero)
    return table


NAMES = {"mae": "MAE", "moco": "MoCo v2", "clip": "CLIP"}
"""What the objectives' papers call them."""
