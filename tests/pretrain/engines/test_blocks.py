"""Activation checkpointing and compiled blocks change when something is computed, not what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.encoders import EncoderConfig
from pretrain.encoders.text import TextConfig, TextTower
from pretrain.engines import processes
from pretrain.engines.blocks import blocks, compile_blocks, recompute
from pretrain.engines.deepspeed import initialize
from pretrain.objective import LossOutput, Objective, ParamGroup, trainable
from pretrain.parts.batch_norm import Kind, convert
from pretrain.parts.precision import autocast
from pretrain.ports import StepSettings
from tests.conftest import Ranks

BATCH_SIZE, STEPS = 8, 3
VIT = EncoderConfig(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 4}
)  # its products exceed ZeRO-3's 1e5, below which parameters stay whole
RESNET = EncoderConfig(name="resnet10t", args={"channels": (8, 16, 24, 32)})


class Towers(Objective):
    """A ViT, a ResNet with batch norm and a text tower, with a frozen copy of the ResNet."""

    def __init__(self, kind: Kind = "rank", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.encoder = encoders.build(VIT, (32, 32))
        self.convolutions = convert(encoders.build(RESNET, (32, 32)), kind, 2)
        self.text = TextTower(TextConfig(vocabulary=16, context=6, width=32, depth=2, heads=2), 16)
        self.teacher = copy.deepcopy(self.convolutions).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(192 + 32 + 16, 32), nn.GELU(), nn.Linear(32, 1))

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        images = batch.views[0]
        with autocast(images.device, self.dtype):
            seen = [self.encoder(images), self.convolutions(images), self.text(batch.index)]
            guess = self.head(torch.cat(seen, dim=1))
            with torch.no_grad():
                wanted = self.teacher(images).mean(dim=1)
        return LossOutput((guess.squeeze(1).float() - wanted.float() - batch.seeds).square().mean(), {})

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(list(trainable(self)))]


def batch_at(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 16, (BATCH_SIZE, 6), generator=generator)
    return Batch((images,), torch.arange(BATCH_SIZE) % 2, tokens)


def sgd(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    """Adam would make large steps of the rounding where the true gradient is zero, as in a key's bias."""
    return torch.optim.SGD([{"params": [p for _, p in g.parameters]} for g in groups], lr=1.0, momentum=0.9)


def run(
    stage: int, accumulation: int = 1, half: bool = False, kind: Kind = "rank", **options: Any
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and gradient norms of this rank's steps, and the state after them."""
    here = processes.start("cpu")
    processes.seed(0)
    objective = Towers(kind, torch.bfloat16 if half else None)
    micro = BATCH_SIZE // here.world_size // accumulation
    engine = initialize(
        objective, sgd, here, micro_batch=micro, accumulation=accumulation, zero_stage=stage, **options
    )
    losses, norms = [], []
    for step in range(STEPS):
        share = list(batch_at(step).split(BATCH_SIZE // here.world_size))[here.rank]
        for micro_batch in share.split(micro):
            output = engine.forward(micro_batch, Progress(step, step * BATCH_SIZE, 10, 100))
            engine.backward(output.loss)
            losses.append(output.loss.item())
        update = engine.step(StepSettings(lr=1e-3, weight_decay=0.1))
        assert update is not None
        norms.append(float(update.grad_norm))
    with engine.whole_parameters() as module:
        state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    engine.close()
    processes.stop()
    return losses, norms, state


def agree(first: Any, second: Any) -> None:
    """The same to the rounding of another order of sums."""
    for (losses, norms, state), (same_losses, same_norms, same_state) in zip(first, second, strict=True):
        assert same_losses == pytest.approx(losses, rel=1e-5)
        assert same_norms == pytest.approx(norms, rel=1e-4)
        assert state.keys() == same_state.keys()
        for name, value in state.items():
            torch.testing.assert_close(
                same_state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("count", "stage"), [(1, 0), (2, 1), (2, 2), (2, 3)])
def test_activation_checkpointing_trains_the_same(ranks: Ranks, count: int, stage: int) -> None:
    """Running statistics of plain batch norms included: the second forward must not move them."""
    plain = ranks(count, run, stage=0)
    agree(plain, ranks(count, run, stage=stage, activation_checkpointing=True))
    assert plain[0][2]["convolutions.bn1.num_batches_tracked"] == STEPS


@pytest.mark.parametrize(("kind", "half"), [("grouped", True), ("sync", False)])
def test_activation_checkpointing_with_accumulation_and_other_batch_norms(
    ranks: Ranks, kind: Kind, half: bool
) -> None:
    cut: dict[str, Any] = {"stage": 2, "accumulation": 2, "half": half, "kind": kind}
    agree(ranks(2, run, **cut), ranks(2, run, activation_checkpointing=True, **cut))


def test_compiled_blocks_train_the_same(ranks: Ranks) -> None:
    """By a backend that traces as inductor does and needs no compiler; with activation checkpointing too."""
    compiled: dict[str, Any] = {"compile_backend": "aot_eager", "activation_checkpointing": True}
    agree(ranks(2, run, stage=1), ranks(2, run, stage=1, timeout=240.0, **compiled))


def kept_for_backward(module: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps, parameters left out."""
    own = {p.data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(images).sum()
    loss.backward()
    return sum(sizes.values())


@pytest.mark.parametrize("config", [VIT, EncoderConfig(name="resnet18")], ids=["vit", "resnet"])
def test_activation_checkpointing_keeps_less(config: EncoderConfig) -> None:
    torch.manual_seed(0)
    plain = encoders.build(config, (32, 32))
    lean, images = copy.deepcopy(plain), torch.randn(4, 3, 32, 32)
    assert recompute(lean) == len(blocks(plain))
    assert kept_for_backward(lean, images) < 0.6 * kept_for_backward(plain, images)
    for (name, p), q in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert q.grad is not None and torch.equal(p.grad, q.grad), name


def test_a_copy_of_a_wrapped_block_is_its_own() -> None:
    """A closure over the block would train the original through the copy."""
    original = encoders.build(VIT, (32, 32))
    recompute(original)
    twin, images = copy.deepcopy(original), torch.randn(2, 3, 32, 32)
    twin(images).sum().backward()
    assert all(p.grad is None for p in original.parameters())
    assert all(p.grad is not None for p in twin.parameters())


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [("vit_tiny_patch16_224", 12, "blocks.0"), ("resnet50", 16, "layer1.0"),
     ("convnext_tiny", 18, "stages.0.blocks.0"), ("swin_tiny_patch4_window7_224", 12, "layers.0.blocks.0")],
)  # fmt: skip
def test_blocks_of_timm_models(name: str, count: int, first: str) -> None:
    with torch.device("meta"):
        found = blocks(convert(encoders.build(EncoderConfig(name=name), (224, 224)), "rank"))
    assert (len(found), found[0][0]) == (count, first)


def test_blocks_of_an_objective_leave_out_frozen_ones() -> None:
    names = [name for name, _ in blocks(Towers("grouped"))]
    assert {"encoder.blocks.1", "convolutions.layer4.0", "text.transformer.resblocks.1"} < set(names)
    assert not any(name.startswith(("teacher", "head")) for name in names)
    assert compile_blocks(Towers(), "eager") == len(names)
