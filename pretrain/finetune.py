"""End-to-end fine-tuning of a pretrained encoder as a classifier, with MAE's recipe.

He et al. 2021 (arXiv:2111.06377 appendix A.1, table 9): AdamW, layer-wise rate decay, mixup, cutmix, label
smoothing, drop path, random erasing. One process; the recipe's parts are timm's own.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError, DataError
from configs.loading import Config
from data_pipeline.config import DataConfig
from data_pipeline.load import build_loader, sequential
from data_pipeline.manifest import Manifest
from data_pipeline.subset import write_subset
from data_pipeline.transform import device_half
from data_pipeline.types import IMAGENET_MEAN, IMAGENET_STD, Batch, CenterCrop, ViewSpec
from pretrain import encoders
from pretrain.clock import Duration, Progress
from pretrain.encoders import EncoderConfig, hub, registered, weights
from pretrain.encoders.finetuning import classifier, erasing, layerwise_groups, mixing
from pretrain.evaluators.few_shot import draw_labels
from pretrain.export.open import open_timm
from pretrain.judging.subject import evaluation_view
from pretrain.optimizers import OptimizerConfig
from pretrain.parts.augmentation import Augmentation
from pretrain.parts.precision import autocast
from pretrain.run import trained
from pretrain.run.folder import RunFolder

NEEDS = frozenset({"views", "target"})

Advance = Callable[[int, int], None]
"""Called with steps made and steps in all."""


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
    precision: Literal["bf16", "fp32"] = "fp32"
    pooling: encoders.Pooling | None = None  # of a ViT's tokens; None: as the source does it
    image_size: int | tuple[int, int] | None = None  # pixels, or height, width; None: the source's

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
    mean: tuple[float, float, float] = IMAGENET_MEAN  # what it has seen images normalised with
    std: tuple[float, float, float] = IMAGENET_STD

    def view(self, augmentation: Augmentation) -> ViewSpec:
        """A random view as this encoder is to be shown it."""
        plain = augmentation.view(self.image_size)
        return replace(plain, mean=self.mean, std=self.std, grey=self.encoder.channels == 1)


def start_of(
    source: str,
    *,
    step: int | None = None,
    scratch: bool = False,
    seed: int = 0,
    pooling: encoders.Pooling | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Start:
    """Where fine-tuning a run folder, an exported folder or a timm name starts.

    `scratch`: with random weights of the same architecture instead, drawn from `seed`; of a timm name nothing
    is downloaded then. `pooling`: of a ViT's tokens, where it isn't to be the source's. `image_size`: another
    than the source's; positions are resampled as timm does it. Raises `UserError`.
    """
    if RunFolder(Path(source)).exists():
        run = trained.read(Path(source), step)
        encoder, config, view = run.encoder, run.config.encoder, run.view
    else:
        encoder, view = open_timm(source, pretrained=not scratch)
        config = _described(source, encoder, view)
    size = view.size
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if scratch:
        with seeded(seed, torch.device("cpu")):
            encoder = encoders.build(config, size)
    elif size != view.size:
        encoder = _at_size(encoder, config, size, source)
    if pooling is not None:
        config = config.model_copy(update={"pooling": pooling})
    return Start(config, size, encoder.state_dict(), view.mean, view.std)


def _at_size(encoder: nn.Module, config: EncoderConfig, size: tuple[int, int], source: str) -> nn.Module:
    """The same weights in an encoder for images of another size."""
    with torch.random.fork_rng(devices=[]):
        try:
            other = encoders.build(config, size)
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("data.")) from error
    weights.carry_over(encoder, other, source)
    return other


def _described(source: str, encoder: nn.Module, view: ViewSpec) -> EncoderConfig:
    """What makes the same network again, of one that timm has made from a folder or a name."""
    known: Any = encoder.pretrained_cfg
    file = hub.config_file(source)  # timm has opened it just now, and forgets the arguments
    described = json.loads(file.read_text()) if file is not None else {}
    arguments = dict(described.get("model_args") or {})
    for name in ("img_size", "num_classes"):  # these follow from the images and the task
        arguments.pop(name, None)
    if view.grey:
        arguments["in_chans"] = 1
    pooling: encoders.Pooling = "token"  # as the arguments say
    if (
        arguments.get("global_pool") == "avg"
        and arguments.get("fc_norm") is False
        and encoders.is_vit(encoder)
    ):
        pooling = "avg"  # as keel's exports spell it
        del arguments["global_pool"], arguments["fc_norm"]
    assert isinstance(view.crop, CenterCrop)
    return EncoderConfig(
        imports=tuple(registered.opened_with(described)),
        name=known["architecture"],
        args=arguments,
        pooling=pooling,
        crop=view.crop.fraction,
    )


def fine_tune(
    start: Start,
    manifest: Path,
    config: FineTuneConfig,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    workers: int = 0,
    advance: Advance | None = None,
) -> nn.Module:
    """A classifier of `manifest`'s classes trained from `start`, in evaluation mode.

    The seed decides on the new layer's weights, the order, crops, mixing and drop path; the process's own
    random state is left as it was. Raises `DataError` where the set has no class names, `RunError` where the
    weights aren't the encoder's.
    """
    data = Manifest.load(manifest)
    if not data.classes:
        raise DataError(f"{manifest}: has no class names; index it with keel data index --classes")
    device = device or torch.device("cpu")
    with seeded(seed, device):
        model = classifier(
            start.encoder, start.image_size, len(data.classes), start.weights, drop_path=config.drop_path
        ).to(device)
        view = start.view(config.augmentation)
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
            _train(model, loader, view, data, config, device, advance)
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
    advance: Advance | None,
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
    dtype = torch.bfloat16 if config.precision == "bf16" else None
    model.train()
    while not progress.done:
        batch = prepare(next(batches).to(device))
        assert batch.target is not None
        images, target = mix(erase(batch.views[0]), batch.target)
        with autocast(device, dtype):
            logits = model(images)
        functional.cross_entropy(logits.float(), target).backward()  # type: ignore[no-untyped-call]
        now = schedule(progress)
        for group, scales in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = now.lr * scales.lr_scale
            group["weight_decay"] = now.weight_decay * scales.weight_decay_scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress = progress.consumed(config.batch_size).applied()
        if advance is not None:
            advance(progress.step, progress.total_steps)


def accuracy(
    model: nn.Module,
    manifest: Path,
    view: ViewSpec,
    *,
    device: torch.device | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """`top1` in percent of a labelled set, and `top5` where there are more than five classes."""
    device = device or torch.device("cpu")
    hits, count, prepare = torch.zeros(5), 0, device_half([view])
    with torch.no_grad():
        for batch in sequential(manifest, view, batch_size=256, workers=workers):
            batch = prepare(batch.to(device))
            assert batch.target is not None
            logits = model(batch.views[0])
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.target.unsqueeze(1)
            hits[: ranked.shape[1]] += ranked.sum(dim=0).cpu()
            count += len(batch)
    found = {"top1": 100 * float(hits[0]) / count}
    return found | {"top5": 100 * float(hits.sum()) / count} if logits.shape[1] > 5 else found


def few_shot_accuracy(
    start: Start, train: Path, val: Path, config: FineTuneConfig, *, shots: int, draw: int, seed: int = 0
) -> float:
    """Top-1 in percent on `val` after fine-tuning on `shots` labels a class of `train`.

    Draw number `draw` has the samples that the few-shot probe's draw of that number has.
    """
    data = Manifest.load(train)
    view = evaluation_view(start.view(config.augmentation), start.encoder.crop)
    labels = torch.cat([batch.target for batch in sequential(train, view, batch_size=256)])  # type: ignore[misc]
    chosen = draw_labels(labels.numpy(), shots, seed=0, draw=draw)
    with tempfile.TemporaryDirectory() as folder:
        write_subset(data, chosen.tolist(), Path(folder))
        model = fine_tune(start, Path(folder) / "manifest.json", config, seed=seed)
    return accuracy(model, val, view)["top1"]


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
