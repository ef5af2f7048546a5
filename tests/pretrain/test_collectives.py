"""Means and agreements over ranks."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from configs.errors import RunError
from pretrain.collectives import (
    Agreement,
    all_reduce_mean,
    average_batch_norm_statistics,
    from_main,
)
from pretrain.engines import processes
from tests.conftest import Ranks


def means() -> dict[str, float]:
    here = processes.start("cpu")
    values = {"b": torch.tensor(float(here.rank)), "a": torch.tensor(2 * here.rank, dtype=torch.int64)}
    found = all_reduce_mean(values)
    assert list(found) == ["b", "a"] and all(
        v.dtype == torch.float32 and v.shape == () for v in found.values()
    )
    assert all_reduce_mean({}) == {}
    processes.stop()
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(("count", "expected"), [(1, 0.0), (2, 0.5), (4, 1.5)])
def test_mean_over_ranks(ranks: Ranks, count: int, expected: float) -> None:
    assert ranks(count, means) == [{"b": expected, "a": 2 * expected}] * count


def test_without_a_process_group_there_is_one_rank() -> None:
    assert float(all_reduce_mean({"a": torch.tensor(3.0)})["a"]) == 3.0
    assert from_main(lambda: 5) == 5
    agreement = Agreement()
    assert [agreement.exchange(n) for n in (4, 0, 0)] == [0, 4, 0]


def agreements() -> list[int]:
    """Rank r offers r + 1 at step 2r, and is late there."""
    here = processes.start("cpu")
    agreement, heard = Agreement(), []
    for step in range(6):
        if step == 2 * here.rank:
            time.sleep(0.05)
        heard.append(agreement.exchange(here.rank + 1 if step == 2 * here.rank else 0))
    heard.append(agreement.settle())
    processes.stop()
    return heard


def test_every_rank_hears_the_same_a_step_later(ranks: Ranks) -> None:
    assert ranks(2, agreements) == [[0, 1, 0, 2, 0, 0, 0]] * 2


def main_only(fail: bool) -> str:
    here = processes.start("cpu")

    def compute() -> str:
        if fail:
            raise RunError(f"rank {here.rank} says no")
        return f"by rank {here.rank}"

    found = from_main(compute)
    processes.stop()
    return found


def unsendable() -> tuple[str, str]:
    """What every rank meets where rank 0 has an error, or a value, that can't be pickled."""
    processes.start("cpu")

    class LocalError(Exception):
        def __init__(self) -> None:
            super().__init__("only rank 0 knows it")
            self.handle = lambda: 0

    def fail() -> None:
        raise LocalError

    told = []
    for compute in (fail, lambda: lambda: 0):
        with pytest.raises((RuntimeError, TypeError)) as failed:
            from_main(compute)
        told.append(str(failed.value))
    processes.stop()
    return told[0], told[1]


def test_what_cannot_be_sent_ends_every_rank_and_not_rank_0_alone(ranks: Ranks) -> None:
    for error, value in ranks(2, unsendable):
        assert "only rank 0 knows it" in error and "Traceback" in error
        assert "function can't be sent to other ranks" in value


def test_rank_0_computes_for_all(ranks: Ranks) -> None:
    assert ranks(2, main_only, fail=False) == ["by rank 0", "by rank 0"]
    with pytest.raises(RunError, match="rank 0 says no"):
        ranks(2, main_only, fail=True)


def batch_norms() -> tuple[list[float], list[float], int]:
    here = processes.start("cpu")
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(3, track_running_stats=False), nn.Linear(2, 2))
    module[0].running_mean.fill_(here.rank)
    module[0].running_var.copy_(torch.tensor([1.0, 3.0 + 2 * here.rank]))
    module[0].num_batches_tracked.fill_(7)
    average_batch_norm_statistics(module)
    processes.stop()
    return module[0].running_mean.tolist(), module[0].running_var.tolist(), int(module[0].num_batches_tracked)


def test_batch_norm_statistics_become_their_mean(ranks: Ranks) -> None:
    assert ranks(2, batch_norms) == [([0.5, 0.5], [1.0, 4.0], 7)] * 2
