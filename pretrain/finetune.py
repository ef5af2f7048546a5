"""End-to-end fine-tuning of a pretrained encoder as a classifier, with MAE's recipe.

He et al. 2021 (arXiv:2111.06377 appendix A.1, table 9): AdamW, layer-wise rate decay, mixup, cutmix, label
smoothing, drop path, random erasing. One process; the recipe's parts are timm's own.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import DataError
from configs.loading import Config
from data_pipeline.config import DataConfig
from data_pipeline.load import build_loader, sequential
from data_pipeline.manifest import Manifest
from data_pipeline.subset import write_subset
from data_pipeline.transform import device_half
from data_pipeline.types import Batch, ViewSpec
from pretrain.augmentation import Augmentation
from pretrain.encoders import EncoderConfig
from pretrain.encoders.finetuning import classifier, erasing, layerwise_groups, mixing
from pretrain.evaluators.few_shot import draw_labels
from pretrain.evaluators.subject import evaluation_view
from pretrain.optimizers import OptimizerConfig
from pretrain.types import Duration, Progress

NEEDS = frozenset({"views", "target"})


class FineTuneConfig(Config):
    """Defaults are MAE's for ViT-B on ImageNet, without its RandAugment."""

    duration: Duration = Duration(100, "epochs")
    batch_size: int = pydantic.Field(1024, gt=0, multiple_of=2)  # pairs are mixed
    optimizer: OptimizerConfig = OptimizerConfig(
        base_lr=5e-4,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        warmup=Duration(5, "epochs"),
        final_lr=1e-6,
    )
    layer_decay: float = pydantic.Field(0.65, gt=0, le=1)  # 1: every layer learns at the same rate
    drop_path: float = pydantic.Field(0.1, ge=0, lt=1)
    mixup: float = pydantic.Field(0.8, ge=0)  # alpha of the Beta distribution; 0 is off
    cutmix: float = pydantic.Field(1.0, ge=0)
    label_smoothing: float = pydantic.Field(0.1, ge=0, lt=1)
    erase: float = pydantic.Field(0.25, ge=0, le=1)  # probability of random erasing
    augmentation: Augmentation = Augmentation(crop_scale=(0.08, 1.0), interpolation="bicubic")

    @pydantic.model_validator(mode="after")
    def _countable(self) -> FineTuneConfig:
        if self.duration.unit == "min" or self.duration.amount == 0:
            raise ValueError("duration: fine-tuning lasts a positive number of steps, epochs or samples")
        return self


@dataclass(frozen=True)
class Start:
    """Where fine-tuning starts: an architecture with weights, pretrained or random."""

    encoder: EncoderConfig
    image_size: tuple[int, int]  # height, width in pixels
    weights: Mapping[str, Tensor]  # of the encoder, under timm's names


def fine_tune(
    start: Start,
    manifest: Path,
    config: FineTuneConfig,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    workers: int = 0,
) -> nn.Module:
    """A classifier of `manifest`'s classes trained from `start`, in evaluation mode.

    The seed decides on the new layer's weights, the order, crops, mixing and drop path; the process's own
    random state is left as it was. Raises `DataError` where the set has no class names.
    """
    data = Manifest.load(manifest)
    if not data.classes:
        raise DataError(f"{manifest}: has no class names; index it with keel data index --classes")
    device = device or torch.device("cpu")
    with seeded(seed, device):
        model = classifier(
            start.encoder, start.image_size, len(data.classes), start.weights, drop_path=config.drop_path
        ).to(device)
        view = config.augmentation.view(start.image_size)
        loader = build_loader(
            DataConfig(manifest=manifest, image_size=start.image_size, workers=workers),
            [view],
            needs=NEEDS,
            seed=seed,
            batch_size=config.batch_size,
            rank=0,
            world_size=1,
            position=0,
        )
        try:
            _train(model, loader, view, data, config, device)
        finally:
            loader.close()
    return model.eval()


def _train(
    model: nn.Module,
    batches: Iterator[Batch],
    view: ViewSpec,
    data: Manifest,
    config: FineTuneConfig,
    device: torch.device,
) -> None:
    groups = layerwise_groups(model, config.layer_decay)
    optimizer = config.optimizer.make(groups)
    progress = Progress(0, 0, config.duration.steps(config.batch_size, data.samples), data.samples)
    schedule = config.optimizer.schedule_for(config.batch_size, data.samples, progress.total_steps)
    prepare, erase = device_half([view]), erasing(config.erase, device)
    mix = mixing(
        len(data.classes),
        mixup=config.mixup,
        cutmix=config.cutmix,
        label_smoothing=config.label_smoothing,
    )
    model.train()
    while not progress.done:
        batch = prepare(next(batches).to(device))
        assert batch.target is not None
        images, target = mix(erase(batch.views[0]), batch.target)
        functional.cross_entropy(model(images).float(), target).backward()  # type: ignore[no-untyped-call]
        now = schedule(progress)
        for group, scales in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = now.lr * scales.lr_scale
            group["weight_decay"] = now.weight_decay * scales.weight_decay_scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress = progress.consumed(config.batch_size).applied()


def accuracy(
    model: nn.Module, manifest: Path, view: ViewSpec, *, device: torch.device | None = None
) -> float:
    """Top-1 in percent of a labelled set."""
    device = device or torch.device("cpu")
    right, count, prepare = 0, 0, device_half([view])
    with torch.no_grad():
        for batch in sequential(manifest, view, batch_size=256):
            batch = prepare(batch.to(device))
            assert batch.target is not None
            right += int((model(batch.views[0]).argmax(dim=1) == batch.target).sum())
            count += len(batch)
    return 100 * right / count


def few_shot_accuracy(
    start: Start, train: Path, val: Path, config: FineTuneConfig, *, shots: int, draw: int, seed: int = 0
) -> float:
    """Top-1 in percent on `val` after fine-tuning on `shots` labels a class of `train`.

    Draw number `draw` has the samples that the few-shot probe's draw of that number has.
    """
    data = Manifest.load(train)
    view = evaluation_view(config.augmentation.view(start.image_size), start.encoder.crop)
    labels = torch.cat([batch.target for batch in sequential(train, view, batch_size=256)])  # type: ignore[misc]
    chosen = draw_labels(labels.numpy(), shots, seed=0, draw=draw)
    with tempfile.TemporaryDirectory() as folder:
        write_subset(data, chosen.tolist(), Path(folder))
        model = fine_tune(start, Path(folder) / "manifest.json", config, seed=seed)
    return accuracy(model, val, view)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All generators of the process at `seed`; afterwards as they were, also on an error."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
