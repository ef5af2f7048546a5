"""Batch norm by groups and over ranks, against torch's own on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.errors import ConfigError
from pretrain.parts import batch_norm

SHAPES = [(12, 5), (12, 5, 3, 4)]


def layer_for(shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = nn.BatchNorm1d(5) if len(shape) == 2 else nn.BatchNorm2d(5)
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    return nn.Sequential(layer)


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_batches_of_their_own(shape: tuple[int, ...]) -> None:
    plain, grouped = layer_for(shape), batch_norm.convert(layer_for(shape), "grouped", 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = torch.cat([plain(part) for part in x.split(4)])
    got = grouped(y)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weight = torch.randn(shape)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-5)
    for (name, a), (_, b) in zip(plain.named_parameters(), grouped.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["grouped", "sync"])
@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics_and_evaluation(shape: tuple[int, ...], kind: Any) -> None:
    plain, other = layer_for(shape), batch_norm.convert(layer_for(shape), kind, 12)
    x = torch.randn(shape) * 3 + 1
    for _ in range(3):
        plain(x), other(x)
    assert other.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def synced(shape: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).chunk(size)[rank].requires_grad_()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).chunk(size)[rank]
    layer = batch_norm.convert(layer_for(tuple(shape)), "sync")
    out = layer(x)
    (out * weight).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, layer.state_dict()["0.running_var"]


@pytest.mark.parametrize("shape", SHAPES)
def test_sync_is_one_batch_on_any_number_of_ranks(ranks: Callable[..., Any], shape: tuple[int, ...]) -> None:
    plain = layer_for(shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = plain(x)
    (out * torch.randn(shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    parts = ranks(2, synced, shape=list(shape))
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), out.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[0][2], plain.state_dict()["0.running_var"], rtol=1e-4, atol=1e-5)


def far_from_zero(shape: list[int]) -> tuple[Tensor, ...]:
    """Output, gradient and running variance of this rank's part, means of about 100 and deviations of .1."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    x = far(shape).chunk(dist.get_world_size())[dist.get_rank()].requires_grad_()
    layer = batch_norm.convert(layer_for(tuple(shape)), "sync")
    out = layer(x)
    (out * weights(shape).chunk(dist.get_world_size())[dist.get_rank()]).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, layer.state_dict()["0.running_var"]


def far(shape: list[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1 + 100


def weights(shape: list[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("count", [1, 2])
def test_sync_is_torchs_where_the_mean_is_far_from_zero(ranks: Callable[..., Any], count: int) -> None:
    """In float32 against torch's own in float64: the mean of squares has no digits left there."""
    shape = [64, 5, 3, 4]
    plain, x = layer_for(tuple(shape)).double(), far(shape).double().requires_grad_()
    out = plain(x)
    (out * weights(shape)).sum().backward()
    assert x.grad is not None
    parts = ranks(count, far_from_zero, shape=shape)
    for index, want, tolerance in ((0, out.detach(), 1e-3), (1, x.grad, 5e-3)):
        made = torch.cat([part[index] for part in parts]).double()
        assert float((made - want).abs().max()) < tolerance * float(want.abs().max())
    torch.testing.assert_close(parts[0][2].double(), plain.state_dict()["0.running_var"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["grouped", "sync"])
def test_recomputation_does_not_move_statistics_twice(kind: Any) -> None:
    layer = batch_norm.convert(layer_for((12, 5)), kind, 4)
    x = torch.randn(12, 5).requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.state_dict()["0.num_batches_tracked"].item() == 1


@pytest.mark.parametrize(
    ("text", "want"), [("grouped:8", ("grouped", 8)), ("sync", ("sync", 0)), ("shuffle", ("rank", 0))]
)
def test_spelling(text: str, want: tuple[str, int]) -> None:
    assert batch_norm.parse(text) == want
    for bad in ("grouped", "grouped:1", "grouped:x", "frozen"):
        with pytest.raises(ValueError, match="allowed: shuffle, sync, grouped:N"):
            batch_norm.parse(bad)


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="10 samples can't be cut into groups of 4"):
        batch_norm.convert(layer_for((12, 5)), "grouped", 4)(torch.randn(10, 5))
    with pytest.raises(ConfigError, match=r"objective\.batch_norm: LazyBatchNorm1d can't be made grouped"):
        batch_norm.convert(nn.Sequential(nn.LazyBatchNorm1d()), "grouped", 4)
