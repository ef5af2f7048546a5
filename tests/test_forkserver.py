"""The ranks fixture itself: results, errors, hangs and deaths."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest
import torch.distributed as dist

from configs.errors import RunError
from pretrain.engines import processes
from tests.conftest import Ranks
from tests.forkserver import Died, RankFailureError


def whoami(word: str) -> tuple[int, int, int, str]:
    here = processes.start("cpu")
    total = [None] * here.world_size
    dist.all_gather_object(total, os.getpid())
    processes.stop()
    processes.stop()  # harmless
    return here.rank, here.world_size, len(set(total)), word


def fails(rank: int) -> None:
    here = processes.start("cpu")
    if here.rank == rank:
        raise RunError("one line")
    dist.barrier()


def hangs() -> None:
    time.sleep(100)


def dies() -> int:
    here = processes.start("cpu")
    if here.rank == 1:
        dist.barrier()  # the other is past its start: what it hears of this death is no failed start
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    return here.rank


held: list[dist.TCPStore] = []  # as a process group holds its store


def leaves_early() -> int:
    here, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    if here == 1:
        time.sleep(1)
    held.append(dist.TCPStore("127.0.0.1", port, is_master=here == 0, wait_for_workers=False))
    if here == 0:
        held[0].set("word", "7")
    return int(held[0].get("word")) + here


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_rank_is_a_process_of_its_own_and_answers(ranks: Ranks, count: int) -> None:
    assert ranks(count, whoami, word="ja") == [(rank, count, count, "ja") for rank in range(count)]


def test_a_ranks_error_is_raised_here_and_the_others_are_ended(ranks: Ranks) -> None:
    with pytest.raises(RunError, match="one line") as caught:
        ranks(2, fails, rank=1)
    assert "rank 1 of 2" in str(caught.value.__cause__) and "in fails" in str(caught.value.__cause__)


def test_a_hang_is_ended(ranks: Ranks) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailureError, match="ran past"):
        ranks(2, hangs, timeout=0.5)
    assert time.monotonic() - started < 20


def test_a_rank_that_is_done_stays_until_the_others_are(ranks: Ranks) -> None:
    assert ranks(2, leaves_early) == [7, 8]


def test_deaths_are_told(ranks: Ranks) -> None:
    with pytest.raises(RankFailureError, match=r"ranks \[1\]"):
        ranks(2, dies)
    assert ranks(2, dies, may_die=True) == [0, Died(signal.SIGKILL)]
