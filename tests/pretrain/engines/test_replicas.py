"""A checkpoint keeps one rank's copy of a buffer: copies that differ are refused before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import RunError
from data_pipeline.types import Batch
from pretrain.accumulation import SumOfMicroBatches
from pretrain.clock import Progress
from pretrain.engines import processes
from pretrain.engines.state import _fingerprint
from tests.conftest import Ranks
from tests.pretrain.engines.tiny import PROGRESS, Tiny, batch_at, engine_of, train


def refusals(stage: int, folder: Path) -> dict[str, str]:
    """By what rank 1 has of its own: what a save says, "" where it saves."""
    engine, objective, here = engine_of(stage, batch_norm=True)
    train(engine, objective, 0, 1)
    told: dict[str, str] = {}

    def save(what: str) -> None:
        try:
            engine.save(folder / what, {})
            told[what] = ""
        except RunError as error:
            told[what] = str(error)

    queue = objective.queue.clone()
    if here.rank == 1:
        objective.cache.fill_(7.0)  # type: ignore[operator]  # not persistent: of no interest
    objective.norm.running_mean.fill_(float(here.rank))  # averaged
    save("nothing that counts")
    objective.queue.copy_(torch.arange(20.0).view(5, 4).roll(here.rank, 0))
    save("its rows in another order")
    objective.queue.copy_(queue)
    if here.rank == 1:
        objective.queue[3, 1] += 1e-5
    save("a last digit, after an equal save")
    assert not (folder / "a last digit, after an equal save" / "index.json").exists()
    objective.queue.copy_(queue)
    save("nothing any more")
    if stage < 3:
        engine._compared = False  # as in the next attempt
        next(objective.teacher.parameters()).data.flatten()[-1] += here.rank
        save("a frozen weight")
    engine.close()
    processes.stop()
    return told


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_state_that_differs_between_ranks_is_refused(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    first, second = ranks(2, refusals, stage=stage, folder=tmp_path)
    assert first == second, "every rank ends"
    assert first.pop("nothing that counts") == first.pop("nothing any more") == ""
    if stage < 3:
        assert first.pop("a frozen weight").startswith(
            "objective: teacher.0.weight differs between the ranks"
        )
    assert len(first) == 2
    for message in first.values():
        assert message.startswith("objective: queue differs between the ranks, and a checkpoint keeps one")
        assert "nothing was saved" in message and "persistent=False" in message and "\n" not in message


def test_a_fingerprint_sees_every_bit_and_its_place() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.complex64):
        x = torch.randn(3, 700).mul(50).to(kind)
        other = x.clone()
        assert torch.equal(_fingerprint(x), _fingerprint(other))
        other[2, 699] += 1
        assert not torch.equal(_fingerprint(x), _fingerprint(other))
        assert not torch.equal(_fingerprint(x), _fingerprint(x.roll(1, 0)))
        assert torch.equal(_fingerprint(x.T), _fingerprint(x.T.contiguous()))
    large = torch.zeros(2**20 + 5)
    for place in (0, 2**20 - 1, 2**20 + 4):
        changed = large.clone()
        changed[place] = 1e-30
        assert not torch.equal(_fingerprint(large), _fingerprint(changed))
    assert _fingerprint(torch.zeros(0)) == 0
    even, wave = torch.zeros(9, dtype=torch.int64), torch.tensor([1, -2, 1])
    for place in range(7):
        uneven = even.clone()
        uneven[place : place + 3] = wave
        assert not torch.equal(_fingerprint(even), _fingerprint(uneven))


class Reader(Tiny):
    """Reads a weight outside of the forward of the layer that holds it."""

    needs_whole_share = True

    def before_step(self, share: Batch, progress: Progress) -> tuple[Tensor, ...]:
        return (share.views[0].flatten(1) @ self.encoder[0].weight.T,)


def reads(stage: int) -> list[str]:
    """What the error of `before_step` says besides itself, [] without one."""
    engine, objective, _ = engine_of(stage)
    objective.__class__ = Reader
    accumulate = SumOfMicroBatches(objective, 8, lambda batch: batch)
    notes: list[str] = []
    try:
        accumulate(engine, batch_at(0), PROGRESS)
    except RuntimeError as error:
        notes = list(getattr(error, "__notes__", []))
    engine.close()
    processes.stop()
    return notes


def test_a_weight_read_outside_of_its_layer_is_explained(ranks: Ranks) -> None:
    told: list[Any] = ranks(1, reads, stage=3)[0]
    assert len(told) == 1
    assert told[0].startswith("under ZeRO-3") and "such as scale, have shape [0]" in told[0]
    assert ranks(1, reads, stage=2) == [[]]
