"""Host copies of a state: memory got beforehand, and used again."""

from __future__ import annotations

import torch

from pretrain.engines.state import HostBuffers
from pretrain.engines.storage import Fragment
from tests.conftest import Ranks
from tests.pretrain.engines.tiny import engine_of, train


def test_what_was_reserved_is_what_is_copied_to() -> None:
    buffers, live = HostBuffers(), torch.arange(5.0)
    buffers.reserve([Fragment("a", live, 0, 5)])
    first = buffers.copy([Fragment("a", live, 0, 5), Fragment("b", live * 2, 3, 8)])
    assert [f.data.tolist() for f in first] == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]]
    live += 1
    assert first[0].data.tolist() == [0, 1, 2, 3, 4]
    again = buffers.copy([Fragment("a", live, 0, 5)])
    assert again[0].data.data_ptr() == first[0].data.data_ptr()
    assert again[0].data.tolist() == [1, 2, 3, 4, 5]


def reserved(stage: int) -> tuple[set[str], set[str]]:
    """Names got beforehand, names that the first save then copies."""
    engine, objective, _ = engine_of(stage, expects_saves=True)
    train(engine, objective, 0, 1)
    thread = engine._buffers._reserving
    assert thread is not None
    thread.join()
    before = {name for name, _ in engine._buffers._kept}
    staged = engine.stage({})
    engine.close()
    return before, {fragment.tensor for fragment in staged.fragments}


def test_the_first_save_finds_its_memory(ranks: Ranks) -> None:
    for before, copied in ranks(2, reserved, stage=1):
        assert before == copied
        assert any(name.startswith("optimizer/exp_avg_sq/") for name in before)
