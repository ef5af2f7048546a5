"""MoCo against its algorithm written out again, and what its queue and teacher may never do."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from configs.errors import ConfigError
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.accumulation import mean_of
from pretrain.clock import Progress
from pretrain.encoders import EncoderConfig
from pretrain.engines.plain import PlainUpdate
from pretrain.objective import BuildContext
from pretrain.objectives.moco import MoCo, MoCoConfig

TINY = EncoderConfig(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})


def make(micro: int = 8, batch: int = 8, **changes: object) -> MoCo:
    torch.manual_seed(0)
    settings = {"width": 6, "queue": 21, "momentum": 0.9, "batch_norm": "grouped:4"} | changes
    context = BuildContext(
        encoders.build(TINY, (32, 32)), (32, 32), 100, batch, None, accumulation=batch // micro
    )
    return MoCoConfig.model_validate(settings).build(context)


def batch_of(count: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = tuple(torch.randn(count, 3, 32, 32, generator=generator) for _ in range(2))
    seeds = torch.arange(count)
    return Batch(views, seeds, seeds)


def clock(step: int = 0) -> Progress:
    return Progress(step=step, samples=8 * step, total_steps=10, dataset_size=100)


UPDATE = PlainUpdate(torch.tensor(1.0))


def prepared(moco: MoCo, batch: Batch) -> Batch:
    with torch.no_grad():
        return replace(batch, prepared=moco.before_step(batch, clock()))


def test_a_step_is_the_papers_algorithm() -> None:
    """Keys from the teacher on the second view in permuted groups, loss over the old queue, then enqueue."""
    moco, batch = make(), batch_of(8)
    student, teacher = copy.deepcopy(moco), copy.deepcopy(moco)
    queue = moco.queue.keys.clone()
    output = moco(prepared(moco, batch), clock())
    loss = output.loss

    q = functional.normalize(student.head(student.encoder(batch.views[0])), dim=1)
    order = moco.key_order(clock(), 8, torch.device("cpu"))
    permuted = teacher.teacher_head(teacher.teacher_encoder(batch.views[1][order])).detach()
    k = torch.empty_like(permuted)
    for position, sample in enumerate(order.tolist()):
        k[sample] = functional.normalize(permuted[position], dim=0)
    want = []
    for row in range(8):
        logits = torch.stack([q[row] @ k[row], *(q[row] @ key for key in queue)]) / 0.2
        want.append(logits.logsumexp(0) - logits[0])
    torch.testing.assert_close(loss, torch.stack(want).mean(), rtol=1e-5, atol=1e-5)

    moco.after_step(UPDATE, clock(1), output)
    torch.testing.assert_close(moco.queue.keys[:8], k)
    assert torch.equal(moco.queue.keys[8:], queue[8:])
    for t, old, s in zip(
        moco.teacher_encoder.parameters(),
        teacher.teacher_encoder.parameters(),
        moco.encoder.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(t, 0.9 * old + 0.1 * s)


def test_accumulation_sees_the_old_queue_and_fills_it_once() -> None:
    whole, parts, batch = make(), make(micro=4), batch_of(8)
    outputs = [
        [whole(prepared(whole, batch), clock())],
        [parts(part, clock()) for part in prepared(parts, batch).split(4)],
    ]
    for moco, output in zip((whole, parts), map(mean_of, outputs), strict=True):
        torch.testing.assert_close(output.loss, outputs[0][0].loss)
        moco.after_step(UPDATE, clock(1), output)
        assert moco.queue.written.item() == 8
    torch.testing.assert_close(whole.queue.keys, parts.queue.keys)


def test_a_look_outside_of_training_leaves_no_trace() -> None:
    moco = make().eval()
    before = copy.deepcopy(moco.state_dict())
    assert moco(batch_of(8), clock()).loss.isfinite()
    assert all(torch.equal(before[name], value) for name, value in moco.state_dict().items())


def test_a_skipped_step_leaves_nothing() -> None:
    """Nothing of a step is on the module: its attributes and tensors are those from before."""
    moco = make()
    before, kept = copy.deepcopy(moco.state_dict()), set(vars(moco))
    moco.encoder.eval()  # batch norm's own statistics aside
    moco.teacher_encoder.eval()
    moco(prepared(moco, batch_of(8, seed=1)), clock())  # the update is then skipped: no after_step
    assert set(vars(moco)) == kept
    assert all(torch.equal(before[name], value) for name, value in moco.state_dict().items())
    output = moco(prepared(moco, batch_of(8, seed=2)), clock(1))
    moco.after_step(UPDATE, clock(2), output)
    assert moco.queue.written.item() == 8


def test_keys_are_permuted_anew_for_every_batch() -> None:
    moco = make()
    orders = {tuple(moco.key_order(clock(step), 8, torch.device("cpu")).tolist()) for step in range(20)}
    assert len(orders) == 20


def test_the_teacher_and_the_queue_are_state_and_not_trained() -> None:
    moco = make()
    names = set(moco.state_dict())
    assert {"queue.keys", "queue.written", "teacher_head.0.weight"} <= names
    assert any(name.startswith("teacher_encoder.") for name in names)
    trained = {name for group in moco.param_groups() for name, _ in group.parameters}
    assert not any(name.startswith(("teacher", "queue")) for name in trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queue": 101}, r"objective\.queue: found 101, larger than the 100 samples"),
        ({"batch_norm": "grouped:3"}, r"objective\.batch_norm: found grouped:3, whose 3 must divide"),
    ],
)  # fmt: skip
def test_impossible_settings_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_the_spelling_of_batch_norm() -> None:
    with pytest.raises(ValueError, match="allowed: shuffle, sync, grouped:N"):
        MoCoConfig(batch_norm="frozen")
