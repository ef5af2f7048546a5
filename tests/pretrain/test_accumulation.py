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
from pretrain.accumulation import WholeShare, accumulate_for
from pretrain.clock import Progress
from pretrain.engines.plain import PlainEngine
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
    output = WholeShare(model, lambda batch: batch)(engine, share, CLOCK)
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


def plain(objective: Objective) -> Any:
    """An engine on one rank, without DeepSpeed."""
    return PlainEngine(
        objective, lambda groups: torch.optim.SGD([p for g in groups for _, p in g.parameters], lr=1.0)
    )


class Prepared(Pairs):
    """A whole-batch loss that wants each sample's number among all, and hands it on."""

    needs_whole_share = True

    def before_step(self, share: Batch, progress: Progress) -> tuple[Tensor, ...]:
        return (share.index.float()[:, None] + 100 * progress.step,)

    def embed(self, batch: Batch) -> Embeddings:
        return (*super().embed(batch), batch.prepared[0])

    def loss(self, embeddings: Embeddings, progress: Progress) -> LossOutput:
        *compared, numbers = embeddings
        output = super().loss(tuple(compared), progress)
        return LossOutput(output.loss, output.metrics, (numbers,))


@pytest.mark.parametrize("micro", [None, 4])
def test_rows_of_a_whole_batch_loss_ride_with_their_samples(micro: int | None) -> None:
    objective = Prepared(micro)
    accumulate = accumulate_for(objective, 4, lambda batch: batch)
    output = accumulate(plain(objective), batch_of(12), CLOCK)
    assert output.rows[0][:, 0].tolist() == [n + 100.0 * CLOCK.step for n in batch_of(12).index.tolist()]
    assert not output.rows[0].requires_grad and not output.loss.requires_grad


class Unsaid(Objective):
    """Has a `before_step`, and forgot to say so. Where it is called, each sample's row is its number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        assert torch.equal(batch.prepared[0], batch.index)  # cut with the samples
        return LossOutput(self.weight.sum(), {}, (batch.prepared[0] * 2, batch.index.float() * self.weight))

    def before_step(self, share: Batch, progress: Progress) -> tuple[Tensor, ...]:
        return (share.index,)

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup([("weight", self.weight)])]


def test_a_before_step_that_would_not_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.name: Unsaid has a before_step .* needs_whole_share"):
        accumulate_for(Unsaid(), 2, lambda batch: batch)


class Said(Unsaid):
    needs_whole_share = True


@pytest.mark.parametrize("micro", [12, 4, 3])
def test_rows_are_cut_with_the_samples_and_joined_again(micro: int) -> None:
    objective, batch = Said(), batch_of(12)
    accumulate = accumulate_for(objective, micro, lambda batch: batch)
    output = accumulate(plain(objective), batch, CLOCK)
    assert torch.equal(output.rows[0], 2 * batch.index)
    assert torch.equal(output.rows[1], batch.index.float()) and not output.rows[1].requires_grad


class Short(Said):
    def before_step(self, share: Batch, progress: Progress) -> tuple[Tensor, ...]:
        return (share.index[1:],)


def test_rows_that_arent_the_samples_are_our_mistake() -> None:
    with pytest.raises(ValueError, match=r"Short\.before_step gave 11 rows for 12 samples"):
        accumulate_for(Short(), 4, lambda b: b)(plain(Short()), batch_of(12), CLOCK)
