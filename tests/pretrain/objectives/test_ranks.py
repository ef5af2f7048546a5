"""Every objective on real ranks: the same training however a global batch is cut, under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.loading import load
from data_pipeline.types import Batch
from pretrain import collectives, encoders
from pretrain.accumulation import accumulate_for
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.encoders import EncoderConfig
from pretrain.engines import deepspeed, processes
from pretrain.evaluators.zero_shot import ZeroShotConfig
from pretrain.export.subject import opener
from pretrain.judging import schedule
from pretrain.judging.evaluate import evaluate
from pretrain.objective import BuildContext, Objective, WholeBatchObjective
from pretrain.ports import StepSettings
from pretrain.run.main import prepare
from tests.pretrain.run.test_main import Ranks, config_for, run_on

EVERY = ("mae", "moco", "moco_v3", "clip", "siglip")
TOWERS = {
    "clip with a resnet": ("clip", ("objective.batch_norm=grouped:8",)),
    "moco_v3 with a resnet": ("moco_v3", ("objective.batch_norm=grouped:8",)),
    "moco_v3 with a synced resnet": ("moco_v3", ("objective.batch_norm=sync",)),
}
"""Smoke configs under other settings and with `RESNET` in the ViT's place."""
RESNET = EncoderConfig(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})
BATCH, STEPS = 32, 3
ZERO = 1e-7  # what a value that is zero in truth comes to, such as a bias in front of batch norm
RATE = 0.03  # at 0.5 a change of 1e-7 in a ResNet grows to 4e-4 of a gradient within two steps


Trace = tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]
"""What a training came to, each tensor whole.

Losses of the global batch; changes of the parameters step by step, which under SGD are gradients times a
rate; and at the end parameters, teacher, queue and statistics.
"""


def build(name: str, world_size: int, accumulation: int) -> Objective:
    smoke, overrides = TOWERS.get(name, (name, ()))
    config = load(f"configs/smoke/{smoke}.yaml", RunConfig, overrides)
    torch.manual_seed(0)
    encoder = encoders.build(RESNET if name in TOWERS else config.encoder, (32, 32))
    context = BuildContext(encoder, (32, 32), 1000, BATCH, None, world_size, accumulation)
    return config.objective.build(context)


def batch_at(step: int) -> Batch:
    """The global batch of a step, with two views and captions."""
    generator = torch.Generator().manual_seed(step)
    views = tuple(torch.randn(BATCH, 3, 32, 32, generator=generator) for _ in range(2))
    seeds = torch.randint(0, 2**62, (BATCH,), generator=generator)
    tokens = torch.randint(1, 320, (BATCH, 9), generator=generator)
    return Batch(views, seeds, torch.arange(BATCH), tokens=tokens)


def trace(name: str, stage: int, accumulation: int, optimizer: str) -> Trace:
    """Three steps, run by each rank."""
    here = processes.start("cpu")
    objective = build(name, here.world_size, accumulation)
    micro = BATCH // here.world_size // accumulation
    # With the usual eps of 1e-8 a gradient that is rounding alone would move its parameter by a whole rate.
    make = torch.optim.SGD if optimizer == "sgd" else partial(torch.optim.AdamW, eps=1e-5)
    engine = deepspeed.initialize(
        objective,
        lambda groups: make([{"params": [p for _, p in group.parameters]} for group in groups], lr=RATE),
        here,
        micro_batch=micro,
        accumulation=1 if isinstance(objective, WholeBatchObjective) else accumulation,
        zero_stage=stage,
    )
    accumulate = accumulate_for(objective, micro, lambda batch: batch)

    def whole() -> dict[str, Tensor]:
        with engine.whole_parameters() as module:
            return {key: value.detach().clone() for key, value in module.state_dict().items()}

    clock, losses, states = Progress(0, 0, 10, 1000), [], [whole()]
    rate = (RATE / 10 if "synced" in name else RATE) if optimizer == "sgd" else 3e-4
    for step in range(STEPS):
        share = list(batch_at(step).split(BATCH // here.world_size))[here.rank]
        output = accumulate(engine, share, clock)
        update = engine.step(StepSettings(lr=rate, weight_decay=0.0))
        assert update is not None
        clock = clock.consumed(BATCH).applied()
        objective.after_step(update, clock, output)
        losses.append(collectives.all_reduce_mean({"loss": output.loss})["loss"].item())
        states.append(whole())
    trained = {key for key, p in objective.named_parameters() if p.requires_grad}
    changes = [{key: after[key] - before[key] for key in trained} for before, after in pairwise(states)]
    engine.close()
    processes.stop()
    return losses, changes, states[-1]


def require_equal(got: Trace, want: Trace, names: Sequence[str], what: str) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-4), what
    for key in names:
        error = (got[2][key].double() - want[2][key].double()).abs().max()
        assert error <= 1e-4 * want[2][key].abs().max() + ZERO, f"{what}: {key}"


CUTS = [(2, 0, 1), (4, 1, 1), (1, 2, 4), (2, 3, 2)]
"""Ranks, ZeRO stage, micro-batches."""


@cache
def names_of(name: str) -> tuple[list[str], list[str]]:
    """What is compared under SGD (all but counters), and under AdamW (what isn't trained)."""
    objective = build(name, 1, 1)
    trained = {key for key, p in objective.named_parameters() if p.requires_grad}
    everything = [key for key in objective.state_dict() if not key.endswith("num_batches_tracked")]
    return everything, [key for key in everything if key not in trained and "running" not in key]


@pytest.mark.parametrize("name", [*EVERY, *TOWERS])
def test_the_cut_of_a_batch_changes_no_gradient(ranks: Ranks, name: str) -> None:
    """Losses, gradients of each step, parameters, teacher, queue and statistics, under plain SGD."""
    [alone] = ranks(1, trace, name=name, stage=0, accumulation=1, optimizer="sgd")
    tower_cuts = [(2, 1, 1 if "synced" in name else 2)]  # sync is for ranks, not for micro-batches
    for count, stage, accumulation in CUTS if name in EVERY else tower_cuts:
        what = f"{count} ranks, stage {stage}, {accumulation} micro-batches"
        for got in ranks(count, trace, name=name, stage=stage, accumulation=accumulation, optimizer="sgd"):
            # Statistics move once a micro-batch, as everywhere in torch: four of them forget sooner than one.
            names = [key for key in names_of(name)[0] if accumulation == 1 or "running" not in key]
            require_equal(got, alone, names, what)
            for mine, its in zip(got[1], alone[1], strict=True):
                for key, change in its.items():
                    rounding = 2.0**-23 * float(alone[2][key].abs().max())  # of a difference of parameters
                    error = float((mine[key] - change).abs().max())
                    assert error <= 1e-4 * float(change.abs().max()) + rounding + ZERO, f"{what}: {key}"


@pytest.mark.parametrize("name", EVERY)
def test_nor_the_teacher_or_the_queue_under_adamw(ranks: Ranks, name: str) -> None:
    """Adam amplifies rounding where a gradient is zero in truth, so parameters aren't compared."""
    [alone] = ranks(1, trace, name=name, stage=0, accumulation=1, optimizer="adamw")
    for got in ranks(2, trace, name=name, stage=1, accumulation=2, optimizer="adamw"):
        require_equal(got, alone, names_of(name)[1], "2 ranks, stage 1, 2 micro-batches")


RUN = ("train.duration=4 steps", "optimizer.warmup=0 steps", "data.workers=0", "train.batch_size=32")


@pytest.mark.parametrize("name", ["moco"])
def test_a_whole_run_is_one_ranks(ranks: Ranks, tmp_path: Path, digits: Path, name: str) -> None:
    alone = run_on(ranks, 1, config_for(tmp_path / "alone", digits, *RUN, "train.zero_stage=0", smoke=name))
    cut = ("train.micro_batch_size=8", "train.zero_stage=3")
    config = config_for(tmp_path / "cut", digits, *RUN, *cut, smoke=name)
    assert run_on(ranks, 2, config) == pytest.approx(alone, rel=1e-4)


def test_a_whole_clip_run_with_captions_and_zero_shot(ranks: Ranks, tmp_path: Path) -> None:
    """Demo data and tokenizer are made, ranks agree, and the score is that of the finished run."""
    data = tmp_path / "data"
    zero_shot = f'{{kind: zero_shot, data: {data}/shapes, templates: ["a {{}}", "there is a {{}}"]}}'
    common = [
        *RUN, f"data.manifest={data}/shapes/train/manifest.json",
        f"data.tokenizer.path={data}/shapes/words.json",
        f"evaluate=[{zero_shot}]",
    ]  # fmt: skip
    found = []
    for count, own in ((1, ["train.zero_stage=0"]), (2, ["train.micro_batch_size=8", "train.zero_stage=2"])):
        root = tmp_path / f"{count}"
        config = load("configs/smoke/clip.yaml", RunConfig, [f"run.dir={root}", *common, *own])
        losses = run_on(ranks, count, config)
        [row] = schedule.read(root / "evaluations.jsonl")
        found.append((losses, row["values"]))
        again = ZeroShotConfig(data=data / "shapes", templates=("a {}", "there is a {}")).placed()
        assert dict(evaluate(opener(str(root)), [again])[0].values) == pytest.approx(row["values"])
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)


def test_a_tower_of_another_vocabulary_is_refused_before_anything_starts(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}/run", "data.demo.samples=64", "objective.text.vocabulary=321"]
    with pytest.raises(ConfigError, match=r"objective\.text\.vocabulary: found 321, .* knows \d+ tokens"):
        prepare(load("configs/smoke/clip.yaml", RunConfig, overrides), world_size=1)
    assert not (tmp_path / "run/config.yaml").exists()
