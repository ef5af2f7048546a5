"""How a global batch becomes gradients: by micro-batches, and for whole-batch losses by cached embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from data_pipeline.types import Batch
from pretrain import collectives
from pretrain.accumulation import SumOfMicroBatches, WholeShare, accumulate_for
from pretrain.clock import Progress
from pretrain.losses import contrastive
from pretrain.objective import Embeddings, LossOutput, Objective, ParamGroup, WholeBatchObjective

CLOCK = Progress(step=0, samples=0, total_steps=5, dataset_size=100)


class Pairs(WholeBatchObjective):
    """The smallest contrastive objective: two towers, a head and a scale, over the whole batch."""

    def __init__(self, micro: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.micro_batch_size = micro
        self.calls: list[int] = []

    def embed(self, batch: Batch) -> Embeddings:
        self.calls.append(len(batch))
        return self.encoder(batch.views[0]), self.encoder(batch.views[1])

    def loss(self, embeddings: Embeddings, progress: Progress) -> LossOutput:
        first, second = (functional.normalize(self.head(e), dim=1) for e in embeddings)
        everything, start = collectives.gather(second), collectives.rank() * len(first)
        over_columns, partial = contrastive.log_sums(first, everything, self.scale.exp(), chunk=3)
        over_rows = collectives.gather(partial[None]).logsumexp(0)[start : start + len(first)]
        positive = self.scale.exp() * (first * second).sum(1)
        return LossOutput((over_columns - positive).mean() / 2 + (over_rows - positive).mean() / 2, {})

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(list(self.named_parameters()))]


def batch_of(count: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    views = tuple(torch.randn(count, 3, 2, 2, generator=generator) for _ in range(2))
    return Batch(views, torch.arange(count), torch.arange(count))


def whole_loss(model: Pairs, batch: Batch) -> Tensor:
    """The same loss with the N x N matrix in hand."""
    first, second = (functional.normalize(model.head(e), dim=1) for e in model.embed(batch))
    logits = model.scale.exp() * first @ second.T
    target = torch.arange(len(batch))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [None, 1, 3, 4, 12])
def test_cached_embeddings_give_the_uncut_loss_and_gradients(micro: int | None) -> None:
    plain, cached, batch = Pairs(None), Pairs(micro), batch_of(12)
    want = whole_loss(plain, batch)
    want.backward()
    got = cached(batch, CLOCK).loss
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    if micro == 4:
        assert cached.calls == [4] * 6, "each micro-batch once without graph, once again for its gradient"


def on_ranks(micro: int, stage: int) -> tuple[float, dict[str, Tensor]]:
    """One SGD step of rate 1 on real DeepSpeed: the change of the parameters is the gradient."""
    from pretrain.engines import deepspeed, processes
    from pretrain.ports import StepSettings

    here = processes.start("cpu")
    model = Pairs(micro)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = deepspeed.initialize(
        model, lambda groups: torch.optim.SGD([p for _, p in groups[0].parameters], lr=1.0), here,
        micro_batch=12 // here.world_size, zero_stage=stage,
    )  # fmt: skip
    share = list(batch_of(12).split(12 // here.world_size))[here.rank]
    output = WholeShare(lambda batch: batch)(engine, share, CLOCK)
    engine.step(StepSettings(lr=1.0, weight_decay=0.0))
    mean = collectives.all_reduce_mean({"loss": output.loss})["loss"].item()
    with engine.whole_parameters() as whole:
        return mean, {name: before[name] - p.detach() for name, p in whole.named_parameters()}


@pytest.mark.parametrize(("count", "stage"), [(1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1)])
def test_ranks_and_stages_give_the_gradient_of_the_global_loss(
    ranks: Callable[..., list[Any]], count: int, stage: int
) -> None:
    plain = Pairs(None)
    want = whole_loss(plain, batch_of(12))
    want.backward()
    for loss, changes in ranks(count, on_ranks, micro=3, stage=stage):
        assert loss == pytest.approx(want.item(), rel=1e-5)
        for name, gradient in gradients(plain).items():
            error = (changes[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-9)
            assert error < 1e-4, name


class Prepared(Pairs):
    """Asks for a call that a whole-batch loss doesn't get."""

    def before_step(self, share: Batch, progress: Progress) -> None:
        raise AssertionError("is never called")


class PreparedAndSaid(Prepared):
    needs_whole_share = True


class Asking(Pairs):
    needs_whole_share = True


class Unsaid(Objective):
    """Has a `before_step`, and forgot to say so."""

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        raise AssertionError("is never computed")

    def before_step(self, share: Batch, progress: Progress) -> None:
        raise AssertionError("is never called")

    def param_groups(self) -> list[ParamGroup]:
        return []


@pytest.mark.parametrize("kind", [Prepared, PreparedAndSaid, Asking])
def test_a_whole_batch_loss_that_expects_before_step_is_refused(kind: type[Pairs]) -> None:
    with pytest.raises(
        ConfigError, match=rf"objective\.name: {kind.__name__} is a WholeBatchObjective, whose"
    ):
        accumulate_for(kind(2), 2, lambda batch: batch)


def test_a_before_step_that_would_not_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.name: Unsaid has a before_step .* needs_whole_share"):
        accumulate_for(Unsaid(), 2, lambda batch: batch)
    said = Unsaid()
    said.needs_whole_share = True  # type: ignore[misc]
    assert isinstance(accumulate_for(said, 2, lambda batch: batch), SumOfMicroBatches)


def test_the_kind_of_loss_decides() -> None:
    assert isinstance(accumulate_for(Pairs(2), 2, lambda batch: batch), WholeShare)
    assert not isinstance(accumulate_for(Pairs(2), 2, lambda batch: batch), SumOfMicroBatches)
