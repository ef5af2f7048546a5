"""The engine over ranks, accumulation and ZeRO stages: same losses, same parameters, nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import RunError
from pretrain.engines import processes, storage
from pretrain.engines.deepspeed import DeepSpeedEngine, LossScale, initialize
from pretrain.objective import ParamGroup
from pretrain.ports import StepSettings
from tests.conftest import Ranks
from tests.pretrain.engines.tiny import PROGRESS, SETTINGS, Tiny, adamw, batch_at, engine_of, train

STAGES = (0, 1, 2, 3)
STEPS = 4


def whole(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Parameters and buffers by name, whole, whatever the stage."""
    with engine.whole_parameters() as module:
        return {name: value.detach().clone() for name, value in module.state_dict().items()}


def close(engine: DeepSpeedEngine) -> None:
    engine.close()
    processes.stop()


def run(
    stage: int, accumulation: int = 1, steps: int = STEPS, **options: Any
) -> tuple[list[float], dict[str, Tensor]]:
    engine, objective, _ = engine_of(stage, accumulation, **options)
    losses = train(engine, objective, 0, steps, accumulation)
    state = whole(engine)
    close(engine)
    return losses, state


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, Tensor]]:
    """The same training in plain torch: AdamW, clipping, EMA and assignment written out."""
    torch.manual_seed(0)
    processes.seed(0)
    model = Tiny()
    optimizer = adamw(model.param_groups())
    losses = []
    for step in range(STEPS):
        for group, own in zip(optimizer.param_groups, model.param_groups(), strict=True):
            group["lr"] = SETTINGS.lr * own.lr_scale
            group["weight_decay"] = SETTINGS.weight_decay * own.weight_decay_scale
        loss = model(batch_at(step), PROGRESS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(model.teacher.parameters(), model.encoder.parameters(), strict=True):
                teacher.copy_(0.9 * teacher + 0.1 * student)
            model.scale.fill_(1.0 + 0.01 * (step + 1))
            model.queue.add_(1.0)
        losses.append(loss.item())
    return losses, {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("count", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_ranks_accumulation_and_stages_train_like_plain_torch(
    ranks: Ranks, plain: tuple[list[float], dict[str, Tensor]], stage: int, count: int, accumulation: int
) -> None:
    if stage == 3 and (count, accumulation) in ((1, 2), (4, 1), (4, 2)):
        pytest.skip("stage 3 costs seconds a case; its other cases cover it")
    for losses, state in ranks(count, run, stage=stage, accumulation=accumulation):
        torch.testing.assert_close(losses, plain[0], rtol=1e-5, atol=0.0)
        for name, value in plain[1].items():
            torch.testing.assert_close(
                state[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def norms(stage: int, clip: float, precision: str = "fp32") -> tuple[float, dict[str, Tensor]]:
    engine, _, here = engine_of(stage, 1, gradient_clip=clip, precision=precision)
    mine = list(batch_at(0).split(8 // here.world_size))[here.rank]
    engine.backward(engine.forward(mine, PROGRESS).loss)
    # Momentum-free and decay-free, so that what moved is the gradient.
    update = engine.step(StepSettings(lr=1.0, weight_decay=0.0))
    assert update is not None and update.grad_norm.shape == () and update.grad_norm.dtype == torch.float32
    found = float(update.grad_norm)
    state = whole(engine)
    close(engine)
    return found, state


@pytest.mark.parametrize("stage", STAGES)
def test_grad_norm_is_the_global_batchs_before_clipping(ranks: Ranks, stage: int) -> None:
    processes.seed(0)
    model = Tiny()
    model(batch_at(0), PROGRESS).loss.backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    for clip in (0.0, 0.01):
        for found, _ in ranks(2, norms, stage=stage, clip=clip):
            assert found == pytest.approx(float(expected), rel=1e-5)


def sgd(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p for _, p in g.parameters]} for g in groups], lr=1.0)


def moved(stage: int, clip: float, precision: str) -> float:
    """How far one step of SGD with rate 1 moves the parameters of the first group."""
    here = processes.start("cpu")
    processes.seed(0)
    objective = Tiny()
    options: dict[str, Any] = {"gradient_clip": clip, "precision": precision}
    engine = initialize(objective, sgd, here, micro_batch=8 // here.world_size, zero_stage=stage, **options)
    before = whole(engine)
    mine = list(batch_at(0).split(8 // here.world_size))[here.rank]
    engine.backward(engine.forward(mine, PROGRESS).loss)
    assert engine.step(StepSettings(lr=1.0, weight_decay=0.0)) is not None
    after = whole(engine)
    close(engine)
    return float(
        torch.stack(
            [(after[n] - before[n]).norm() for n in before if n.startswith("encoder") and "weight" in n]
        ).norm()
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_bounds_the_step_and_loss_scaling_leaves_it(
    ranks: Ranks, stage: int, precision: str
) -> None:
    processes.seed(0)
    model = Tiny()
    model(batch_at(0), PROGRESS).loss.backward()
    weights = [p.grad.norm() for n, p in model.encoder.named_parameters() if n.endswith("weight")]  # type: ignore[union-attr]
    free = float(torch.stack(weights).norm())
    assert ranks(2, moved, stage=stage, clip=0.0, precision=precision)[0] == pytest.approx(free, rel=1e-4)
    assert ranks(2, moved, stage=stage, clip=0.01, precision=precision)[0] == pytest.approx(0.01, rel=0.1)


def poisoned(
    stage: int, precision: str, **options: Any
) -> tuple[bool, dict[str, Tensor], dict[str, Tensor], float, list[float]]:
    engine, objective, here = engine_of(stage, 2, batch_norm=True, precision=precision, **options)
    train(engine, objective, 0, 2, 2)
    before = everything(engine, here.rank)
    scale = engine.loss_scale.value if engine.loss_scale else 1.0
    for number, micro in enumerate(batch_at(2, poison=here.rank == 0).split(8 // here.world_size // 2)):
        if number < 2:
            engine.backward(engine.forward(micro, PROGRESS).loss)
    skipped = engine.step(SETTINGS) is None
    after = everything(engine, here.rank)
    ratio = engine.loss_scale.value / scale if engine.loss_scale else 1.0
    goes_on = train(engine, objective, 3, 5, 2)
    close(engine)
    return skipped, before, after, ratio, goes_on


def everything(engine: DeepSpeedEngine, rank: int) -> dict[str, Tensor]:
    """Masters, moments, step counts and working parameters of this rank."""
    staged = engine.stage({})
    found = {
        f"{f.tensor}@{f.start}": f.data.clone() for f in staged.fragments if not f.tensor.startswith("rank/")
    }
    counts = {name: values["step"]["tensor"] for name, values in staged.state["scalars"].items()}
    return found | whole(engine) | {f"step {name}": torch.tensor(n) for name, n in counts.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_update_with_nan_changes_nothing_and_training_goes_on(
    ranks: Ranks, stage: int, precision: str
) -> None:
    for skipped, before, after, ratio, goes_on in ranks(2, poisoned, stage=stage, precision=precision):
        assert skipped
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
        assert ratio == (0.5 if precision == "fp16" else 1.0)
        assert all(loss == loss for loss in goes_on)


def test_loss_scale_falls_on_overflow_and_grows_in_calm() -> None:
    scale = LossScale(value=8.0, interval=2)
    scale.overflowed()
    assert scale.value == 4.0
    scale.applied()
    assert scale.value == 4.0
    scale.applied()
    assert (scale.value, scale.calm) == (8.0, 0)


def saved(
    stage: int, directory: Path, steps: int = 3, **options: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Train, save, train on: losses after the save, and the state at the save."""
    engine, objective, here = engine_of(stage, batch_norm=True, **options)
    train(engine, objective, 0, steps)
    torch.rand(here.rank + 1)
    engine.save(directory, {"step": steps, "note": "ä"})
    state = whole(engine)
    draws = [float(torch.rand(()))]
    losses = train(engine, objective, steps, steps + 3)
    close(engine)
    return losses + draws, state


def resumed(
    stage: int, directory: Path, steps: int = 3, **options: Any
) -> tuple[list[float], dict[str, Tensor]]:
    engine, objective, _ = engine_of(stage, batch_norm=True, **options)
    train(engine, objective, 50, 52)  # leave traces that loading must wipe out
    extra = engine.load(directory)
    assert extra == {"step": steps, "note": "ä"}
    state = whole(engine)
    draws = [float(torch.rand(()))]
    losses = train(engine, objective, steps, steps + 3)
    close(engine)
    return losses + draws, state


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [1, 2])
def test_same_ranks_and_stage_resume_bit_exactly(
    ranks: Ranks, tmp_path: Path, stage: int, count: int
) -> None:
    straight = ranks(count, saved, stage=stage, directory=tmp_path / "c")
    again = ranks(count, resumed, stage=stage, directory=tmp_path / "c")
    for (losses, state), (same_losses, same_state) in zip(straight, again, strict=True):
        assert losses == same_losses
        assert state.keys() == same_state.keys()
        for name in state:
            assert torch.equal(state[name], same_state[name]), name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 1), (4, 1)), ((4, 2), (2, 1)), ((2, 1), (2, 3)),
        ((2, 3), (2, 0)), ((2, 0), (4, 2)), ((4, 3), (1, 3)), ((1, 3), (2, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_other_ranks_and_stages_resume_the_same_losses(
    ranks: Ranks, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    straight = ranks(before[0], saved_without_norm, stage=before[1], directory=tmp_path / "c")[0]
    again = ranks(after[0], resumed_without_norm, stage=after[1], directory=tmp_path / "c")[0]
    torch.testing.assert_close(again[0], straight[0], rtol=1e-6, atol=1e-7)
    for name in straight[1]:
        assert torch.equal(straight[1][name], again[1][name]), name


def saved_without_norm(stage: int, directory: Path) -> tuple[list[float], dict[str, Tensor]]:
    engine, objective, _ = engine_of(stage)
    train(engine, objective, 0, 3)
    engine.save(directory, {})
    state = whole(engine)
    losses = train(engine, objective, 3, 6)
    close(engine)
    return losses, state


def resumed_without_norm(stage: int, directory: Path) -> tuple[list[float], dict[str, Tensor]]:
    engine, objective, _ = engine_of(stage)
    engine.load(directory)
    state = whole(engine)
    losses = train(engine, objective, 3, 6)
    close(engine)
    return losses, state


@pytest.mark.parametrize("stage", STAGES)
def test_the_reader_for_export_gives_the_live_parameters(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    _, state = ranks(2, saved, stage=stage, directory=tmp_path / "c")[0]
    read = storage.read_model(tmp_path / "c")
    assert read.keys() == state.keys()  # frozen parameters and buffers too, non-persistent ones not
    assert {"teacher.0.weight", "queue", "norm.running_mean", "norm.num_batches_tracked"} < read.keys()
    assert "cache" not in read
    for name, value in state.items():
        assert torch.equal(read[name], value), name
        assert read[name].dtype == value.dtype


def loaded_into_another(directory: Path) -> None:
    engine, _, _ = engine_of(1, hidden=2300)
    engine.load(directory)


def test_another_model_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1, saved_without_norm, stage=1, directory=tmp_path / "c")
    with pytest.raises(RunError, match=r"encoder.0.bias has shape \[2200\] there, \[2300\] here"):
        ranks(1, loaded_into_another, directory=tmp_path / "c")


def on_rank_0_only(stage: int) -> tuple[float, float, bool]:
    """A forward in the whole model on rank 0 only: must not wait for the other rank."""
    engine, objective, here = engine_of(stage)
    train(engine, objective, 0, 2)
    batch = batch_at(7)
    with engine.whole_parameters() as module, torch.no_grad():
        value = float(module(batch, PROGRESS).loss) if here.rank == 0 else 0.0
        assert not module.training
    assert objective.training
    after = train(engine, objective, 2, 3)
    close(engine)
    return value, after[0], objective.training


@pytest.mark.parametrize("stage", STAGES)
def test_whole_parameters_serve_one_rank_alone(ranks: Ranks, stage: int) -> None:
    here, there = ranks(2, on_rank_0_only, stage=stage)
    expected = ranks(1, on_rank_0_only, stage=0)[0]
    assert here[0] == pytest.approx(expected[0], rel=1e-5)
    assert here[1] == pytest.approx(expected[1], rel=1e-5) and there[1] == here[1]


def misused(what: str) -> None:
    engine, _, _ = engine_of(1, 2)
    loss = engine.forward(batch_at(0), PROGRESS).loss
    engine.backward(loss)
    if what == "early":
        engine.step(SETTINGS)
    engine.backward(engine.forward(batch_at(0), PROGRESS).loss)
    engine.backward(engine.forward(batch_at(0), PROGRESS).loss)


def test_steps_at_the_wrong_micro_batch_are_our_mistake(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="after 1 of 2"):
        ranks(1, misused, what="early")
    with pytest.raises(RuntimeError, match="call step"):
        ranks(1, misused, what="late")


class Forgetful(Tiny):
    def param_groups(self) -> list[ParamGroup]:
        return super().param_groups()[:1]


class Pointlike(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup([(n, p) for n, p in self.named_parameters() if p.requires_grad])]


def of_kind(kind: str) -> None:
    initialize(
        {"forgetful": Forgetful, "pointlike": Pointlike}[kind](), adamw, processes.start("cpu"), micro_batch=8
    )


def test_param_groups_must_fit(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=r"every trainable parameter once.*encoder.0.bias"):
        ranks(1, of_kind, kind="forgetful")
    with pytest.raises(ValueError, match=r"shape \[1\] to scale"):
        ranks(1, of_kind, kind="pointlike")


def assigned(stage: int) -> dict[str, Tensor]:
    """Set whole parameters once, then make a step that moves nothing: a stale master would undo it."""
    engine, objective, _ = engine_of(stage)
    losses = []
    for value in (None, 3.0, None):
        share = 8 // torch.distributed.get_world_size()
        output = engine.forward(batch_at(0).split(share).__next__(), PROGRESS)
        engine.backward(output.loss)
        update = engine.step(StepSettings(lr=0.0, weight_decay=0.0))
        assert update is not None
        if value is not None:
            for parameter in (
                objective.encoder[0].weight,
                objective.encoder[2].bias,
                objective.teacher[0].weight,
            ):  # type: ignore[index]
                update.assign(parameter, torch.full(getattr(parameter, "ds_shape", parameter.shape), value))
        losses.append(output.loss.item())
    assert losses[0] == losses[1] != losses[2]
    state = whole(engine)
    close(engine)
    return state


@pytest.mark.parametrize("stage", STAGES)
def test_an_assigned_parameter_stays_assigned(ranks: Ranks, stage: int) -> None:
    for state in ranks(2, assigned, stage=stage):
        for name in ("encoder.0.weight", "encoder.2.bias", "teacher.0.weight"):
            assert torch.equal(state[name], torch.full_like(state[name], 3.0)), name
        assert not torch.equal(state["encoder.2.weight"], torch.full_like(state["encoder.2.weight"], 3.0))
