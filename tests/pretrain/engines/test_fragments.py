"""DeepSpeed's private names, held against the installed version."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero import stage_1_and_2
from torch import nn

from configs.errors import RunError
from pretrain.engines import fragments, processes
from tests.conftest import Ranks
from tests.pretrain.engines.tiny import engine_of, train


@pytest.mark.parametrize("version", ["0.99.1", "0.20.0", "0.19.7", "0.19", "0.9.10", "1.0"])
def test_an_unknown_deepspeed_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """0.19.7 and older lack `_wait_for_offload_copies`: a run would fail in its first step."""
    monkeypatch.setattr(fragments, "version", lambda name: version)
    with pytest.raises(
        RunError, match=rf"deepspeed {version} is unknown.*from 0.19.8 on.*tests/pretrain/engines"
    ):
        fragments.require_known_deepspeed()


def test_the_known_deepspeeds_are_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fragments.require_known_deepspeed()
    for known in ("0.19.8", "0.19.8+cu130", "0.19.12"):
        monkeypatch.setattr(fragments, "version", lambda name, known=known: known)
        fragments.require_known_deepspeed()
    wanted = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    first, beyond = fragments.KNOWN_DEEPSPEED
    assert f"deepspeed>={first},<{beyond}" in wanted
    assert hasattr(stage_1_and_2.DeepSpeedZeroOptimizer, "_wait_for_offload_copies")


def coverage(stage: int) -> dict[str, list[tuple[int, int]]]:
    """Slices this rank's shards hold of every trainable parameter; checks that they hold its values."""
    engine, objective, _ = engine_of(stage)
    train(engine, objective, 0, 1)
    held: dict[str, list[tuple[int, int]]] = {}
    with engine.whole_parameters() as module:
        values = {name: p.detach().reshape(-1) for name, p in module.named_parameters()}
    for shard in fragments.shards(engine._engine):
        entry = fragments.base_optimizer(engine._engine).state[shard.key]
        assert entry["exp_avg"].shape == shard.key.shape
        for piece in shard.pieces:
            assert piece.total == values[piece.name].numel() and piece.name in shard.names
            master = fragments.read_slice(shard.master, piece.offset, piece.length)
            expected = values[piece.name][piece.start : piece.start + piece.length]
            assert torch.equal(master, expected), piece
            held.setdefault(piece.name, []).append((piece.start, piece.length))
    engine.close()
    processes.stop()
    return held


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shards_of_all_ranks_cover_every_parameter_once(ranks: Ranks, stage: int) -> None:
    everyone = ranks(2, coverage, stage=stage)
    for name, total in {"encoder.0.weight": 105600, "encoder.2.bias": 4, "scale": 1}.items():
        pieces = [slice_ for held in everyone[: 1 if stage == 0 else 2] for slice_ in held.get(name, [])]
        covered = [element for start, length in pieces for element in range(start, start + length)]
        assert sorted(covered) == list(range(total)), name


def test_slices_reach_any_memory_format() -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    flat = fragments.read_slice(tensor, 0, 120).clone()
    other = torch.zeros_like(tensor)
    assert not other.is_contiguous()
    fragments.write_slice(other, 0, flat)
    assert torch.equal(other, tensor)


def test_only_persistent_buffers_are_state() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    module.register_buffer("kept", torch.zeros(2))
    module[0].register_buffer("cache", torch.zeros(2), persistent=False)
    names = [name for name, _ in fragments.persistent_buffers(module)]
    assert names == ["kept", "0.running_mean", "0.running_var", "0.num_batches_tracked"]
