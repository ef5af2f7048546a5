"""The engine for tests of a step: what a plain torch loop does, behind the port."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pretrain.api import (
    Batch,
    LossOutput,
    Objective,
    ParamGroup,
    PlainEngine,
    Progress,
    StepSettings,
    Update,
    accumulate_for,
)

CLOCK = Progress(step=0, samples=0, total_steps=9, dataset_size=100)
SETTINGS = StepSettings(lr=0.1, weight_decay=0.0)


class Line(Objective):
    """A linear encoder with a slow copy and a bounded scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(3, 2)
        self.slow, self.scale = copy.deepcopy(self.encoder), nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        rows = self.encoder(batch.views[0]) * self.scale
        return LossOutput(rows.square().mean(), {}, (batch.index,))

    def after_step(self, update: Update, progress: Progress, output: LossOutput) -> None:
        update.lerp(self.slow, self.encoder, 0.9)
        update.clamp(self.scale, 0.99, 0.5)
        self.seen += output.rows[0].tolist()

    def param_groups(self) -> list[ParamGroup]:
        return [
            ParamGroup(list(self.encoder.named_parameters(prefix="encoder"))),
            ParamGroup([("scale", self.scale)], lr_scale=0.5),
        ]


def sgd(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p for _, p in group.parameters]} for group in groups], lr=1.0)


def batch(poison: bool = False) -> Batch:
    images = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    if poison:
        images[3, 0] = torch.nan
    return Batch((images,), torch.arange(6), torch.arange(6))


def test_a_step_is_torchs_in_whole_or_in_micro_batches() -> None:
    plain = Line()
    plain(batch(), CLOCK).loss.backward()
    for micro in (6, 3, 2):
        objective = Line()
        engine = PlainEngine(objective, sgd, accumulation=6 // micro)  # type: ignore[arg-type]
        output = accumulate_for(objective, micro, lambda share: share)(engine, batch(), CLOCK)  # type: ignore[arg-type]
        update = engine.step(SETTINGS)
        assert update is not None
        for name, p in plain.named_parameters():
            if p.grad is not None:
                scale = 0.05 if name == "scale" else 0.1
                torch.testing.assert_close(objective.get_parameter(name), p - scale * p.grad)
        before = copy.deepcopy(objective.slow.weight)
        objective.after_step(update, CLOCK.applied(), output)
        torch.testing.assert_close(objective.slow.weight, 0.9 * before + 0.1 * objective.encoder.weight)
        assert objective.scale.item() <= 0.99 and objective.seen == list(range(6))


def test_what_isnt_finite_changes_nothing() -> None:
    objective = Line()
    before = copy.deepcopy(objective.state_dict())
    engine = PlainEngine(objective, sgd)  # type: ignore[arg-type]
    engine.backward(engine.forward(batch(poison=True), CLOCK).loss)
    assert engine.step(SETTINGS) is None
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())
    assert all(p.grad is None for p in objective.parameters())
