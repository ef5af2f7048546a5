"""A small objective with all kinds of state: trainable and frozen parameters, buffers, a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from pretrain.clock import Progress
from pretrain.engines import processes
from pretrain.engines.deepspeed import DeepSpeedEngine, initialize
from pretrain.objective import LossOutput, Objective, ParamGroup, Update
from pretrain.ports import StepSettings

PROGRESS = Progress(step=0, samples=0, total_steps=100, dataset_size=1000)
SETTINGS = StepSettings(lr=1e-3, weight_decay=0.1)
BATCH_SIZE = 8


class Tiny(Objective):
    """Two layers on 3x4x4 images; `wide` is above ZeRO-3's threshold for parameters that stay whole (1e5)."""

    def __init__(self, hidden: int = 2200, batch_norm: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(48, hidden), nn.GELU(), nn.Linear(hidden, 4))
        self.teacher = nn.Sequential(nn.Linear(48, hidden), nn.GELU(), nn.Linear(hidden, 4))
        self.teacher.load_state_dict(self.encoder.state_dict())
        self.teacher.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(4) if batch_norm else nn.Identity()
        self.register_buffer("queue", torch.zeros(5, 4))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.queue: Tensor

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        flat = batch.views[0].flatten(1)
        with torch.no_grad():
            wanted = self.teacher(flat)
        found = self.norm(self.encoder(flat)) * self.scale
        loss = ((found - wanted - flat.mean(1, keepdim=True)) ** 2).mean() + 0.01 * found.sin().mean()
        return LossOutput(loss, {"size": found.detach().abs().mean()})

    def param_groups(self) -> list[ParamGroup]:
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        return [
            ParamGroup([(n, p) for n, p in named if p.ndim > 1]),
            ParamGroup([(n, p) for n, p in named if p.ndim == 1], weight_decay_scale=0.0, lr_scale=0.5),
        ]

    def after_step(self, update: Update, progress: Progress, output: LossOutput) -> None:
        update.lerp(self.teacher, self.encoder, momentum=0.9)
        update.assign(self.scale, torch.full((1,), 1.0 + 0.01 * progress.step))
        self.queue.add_(1.0)


def adamw(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [p for _, p in g.parameters]} for g in groups], lr=1.0, fused=True)


def batch_at(step: int, poison: bool = False) -> Batch:
    """The global batch of `step`."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH_SIZE, 3, 4, 4, generator=generator)
    if poison:
        images[0, 0, 0, 0] = torch.nan
    number = torch.arange(BATCH_SIZE)
    return Batch(views=(images,), seeds=number, index=number)


def engine_of(
    stage: int = 1, accumulation: int = 1, hidden: int = 2200, batch_norm: bool = False, **options: object
) -> tuple[DeepSpeedEngine, Tiny, processes.Processes]:
    """A started process group, a seeded objective and its engine."""
    here = processes.start("cpu")
    processes.seed(0)
    objective = Tiny(hidden, batch_norm)
    micro = BATCH_SIZE // here.world_size // accumulation
    engine = initialize(
        objective, adamw, here, micro_batch=micro, accumulation=accumulation, zero_stage=stage, **options
    )  # type: ignore[arg-type]
    return engine, objective, here


def train(
    engine: DeepSpeedEngine, objective: Tiny, start: int, end: int, accumulation: int = 1, poison: int = -1
) -> list[float]:
    """Losses of the whole batch at steps [start, end); `poison`: the step whose batch has a NaN."""
    here = processes.start("cpu")
    losses = []
    for step in range(start, end):
        progress = Progress(step, step * BATCH_SIZE, 100, 1000)
        share = BATCH_SIZE // here.world_size
        mine = list(batch_at(step, poison == step).split(share))[here.rank]
        total = torch.zeros(())
        for micro in mine.split(share // accumulation):
            output = engine.forward(micro, progress)
            engine.backward(output.loss)
            total += output.loss.detach() / accumulation
        update = engine.step(SETTINGS)
        if update is not None:
            objective.after_step(update, progress.applied(), output)
        torch.distributed.all_reduce(total)
        losses.append(float(total) / here.world_size)
    return losses
