"""MoCo v3 against its algorithm written out again, and what of it stays fixed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.encoders import EncoderConfig, vit
from pretrain.engines.plain import PlainUpdate
from pretrain.objective import BuildContext
from pretrain.objectives.moco_v3 import MoCoV3, MoCoV3Config

VIT = EncoderConfig(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
)
RESNET = EncoderConfig(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})
CLOCK = Progress(step=5, samples=40, total_steps=10, dataset_size=100)


def make(encoder: EncoderConfig = VIT, accumulation: int = 1, **changes: object) -> MoCoV3:
    torch.manual_seed(0)
    context = BuildContext(
        encoders.build(encoder, (32, 32)), (32, 32), 100, 8, None, accumulation=accumulation
    )
    return MoCoV3Config.model_validate({"width": 6, "hidden": 10} | changes).build(context)


def batch_of(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = tuple(torch.randn(count, 3, 32, 32, generator=generator) for _ in range(2))
    return Batch(views, torch.arange(count), torch.arange(count))


def contrast(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    losses = []
    for row, own in zip(query, key, strict=True):
        logits = torch.stack([row @ other for other in key]) / temperature
        losses.append(logits.exp().sum().log() - row @ own / temperature)
    return 2 * temperature * torch.stack(losses).mean()


def through(head: nn.Sequential, x: Tensor) -> Tensor:
    """A head written out: batch norm by the mean and biased variance of all rows."""
    for layer in head:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.T
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
        else:
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
            x = x if layer.weight is None else x * layer.weight + layer.bias
    return x


@pytest.mark.parametrize(("encoder", "temperature"), [(VIT, 0.2), (RESNET, 1.0)], ids=["vit", "resnet"])
def test_a_step_is_the_papers_algorithm(encoder: EncoderConfig, temperature: float) -> None:
    model, batch = make(encoder, temperature=temperature, batch_norm="rank"), batch_of()
    with torch.no_grad():  # so that the teacher is another network
        for p in [*model.teacher_encoder.parameters(), *model.teacher_projector.parameters()]:
            p.mul_(1.1)
    again = copy.deepcopy(model)
    output = model(batch, CLOCK)
    loss = output.loss
    loss.backward()

    plain = copy.deepcopy(again).double()
    q, k = [], []
    for view in batch.views:
        own, theirs = plain.encoder(view.double()), plain.teacher_encoder(view.double())
        q.append(functional.normalize(through(plain.predictor, through(plain.projector, own)), dim=1))
        k.append(functional.normalize(through(plain.teacher_projector, theirs), dim=1))
    want = contrast(q[0], k[1].detach(), temperature) + contrast(q[1], k[0].detach(), temperature)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    for (name, p), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if p.requires_grad:
            assert p.grad is not None and other.grad is not None
            assert (p.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max() + 1e-6, name
        else:
            assert p.grad is None

    before = copy.deepcopy(model.teacher_encoder)
    model.after_step(PlainUpdate(torch.tensor(1.0)), CLOCK, output)
    momentum = 1 - 0.5 * (1 + math.cos(math.pi * 0.5)) * 0.01
    assert momentum == pytest.approx(model.momentum_at(CLOCK))
    for t, old, s in zip(
        model.teacher_encoder.parameters(), before.parameters(), model.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(t, momentum * old + (1 - momentum) * s)


def test_patch_projection_and_positions_of_a_vit_are_fixed() -> None:
    model = make()
    trained = {name for group in model.param_groups() for name, _ in group.parameters}
    assert not any("patch_embed" in name or "pos_embed" in name for name in trained)
    assert not any(name.startswith("teacher") for name in trained)
    torch.testing.assert_close(model.encoder.pos_embed, vit.sincos_positions(24, (4, 4), prefix=1))
    assert model.encoder.patch_embed.proj.weight.std() > 0.01
    thawed = {name for group in make(freeze_patches=False).param_groups() for name, _ in group.parameters}
    assert "encoder.patch_embed.proj.weight" in thawed


def test_heads_are_the_authors() -> None:
    """builder.py: depth of the heads, no bias anywhere, batch norm without scale and shift at the end."""

    def layers(head: nn.Module) -> list[str]:
        return [type(m).__name__.replace("SyncBatchNorm", "norm") for m in head.modules()][1:]

    hidden, last = ["Linear", "norm", "ReLU"], ["Linear", "norm"]
    for_vit, for_resnet = make(), make(RESNET)
    assert layers(for_vit.projector) == [*hidden, *hidden, *last]
    assert layers(for_vit.predictor) == [*hidden, *last]
    assert layers(for_resnet.projector) == [*hidden, *last]
    assert layers(for_resnet.predictor) == [*hidden, "Linear"]
    for model in (for_vit, for_resnet):
        linear = [m for h in (model.projector, model.predictor) for m in h if type(m) is nn.Linear]
        assert all(m.bias is None for m in linear) and model.projector[-1].weight is None


def test_the_start_is_the_authors() -> None:
    """vits.py: uniform with Xavier's bound, of query, key and value each on its own."""
    encoder: Any = make().encoder
    for weight, bound in (
        (encoder.blocks[0].attn.qkv.weight, math.sqrt(6 / (24 + 24))),
        (encoder.blocks[0].mlp.fc1.weight, math.sqrt(6 / (24 + 96))),
        (encoder.patch_embed.proj.weight, math.sqrt(6 / (3 * 8 * 8 + 24))),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound
    assert encoder.blocks[0].attn.qkv.bias.abs().max() == 0


def test_micro_batches_change_nothing_and_the_teacher_runs_once() -> None:
    whole, cut, batch = make(), make(accumulation=4), batch_of()
    calls = []
    cut.teacher_encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    first, second = whole(batch, CLOCK).loss, cut(batch, CLOCK).loss
    torch.testing.assert_close(first, second)
    first.backward()
    second.backward()
    assert len(calls) == 2 * 4, "two views of four micro-batches, not again in the second pass"
    for (name, a), (_, b) in zip(whole.named_parameters(), cut.named_parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None
            assert (b.grad - a.grad).abs().max() <= 1e-4 * a.grad.abs().max() + 1e-6, name


def test_per_rank_batch_norm_and_micro_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: found 4, .*batch_norm=sync"):
        make(RESNET, accumulation=2)
