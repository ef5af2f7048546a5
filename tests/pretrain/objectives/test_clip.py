"""CLIP and SigLIP against their formulas in float64, their scale and its bound, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.encoders import EncoderConfig
from pretrain.engines import deepspeed, processes
from pretrain.objective import BuildContext, Embeddings, LossOutput
from pretrain.objectives.clip import CLIP, CLIPConfig
from pretrain.ports import StepSettings

VIT = EncoderConfig(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
)
RESNET = EncoderConfig(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})
TEXT = {"vocabulary": 40, "context": 8, "width": 16, "depth": 1, "heads": 2}
CLOCK = Progress(step=0, samples=0, total_steps=10, dataset_size=100)

Array = npt.NDArray[np.float64]


def make(encoder: EncoderConfig = VIT, context: dict[str, Any] | None = None, **changes: object) -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig.model_validate({"width": 12, "text": TEXT} | changes)
    facts: dict[str, Any] = {"batch_size": 8, "autocast": None} | (context or {})
    return config.build(BuildContext(encoders.build(encoder, (32, 32)), (32, 32), 100, **facts))


def batch_of(count: int = 8, length: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 39, (count, length), generator=generator)
    tokens[torch.arange(count), torch.arange(count) % (length - 2) + 2] = 39
    return Batch((images,), torch.arange(count), torch.arange(count), tokens=tokens)


def softmax_loss(images: Array, texts: Array, scale: float, bias: float) -> float:
    logits = scale * images @ texts.T
    losses = []
    for n in range(len(images)):
        losses.append(np.log(np.exp(logits[n]).sum()) - logits[n, n])
        losses.append(np.log(np.exp(logits[:, n]).sum()) - logits[n, n])
    return float(np.mean(losses))


def sigmoid_loss(images: Array, texts: Array, scale: float, bias: float) -> float:
    total = 0.0
    for n, image in enumerate(images):
        for m, text in enumerate(texts):
            z = 1 if n == m else -1
            total += np.log1p(np.exp(-z * (scale * image @ text + bias)))
    return total / len(images)


def unit(rows: Tensor) -> Array:
    array = rows.detach().double().numpy()
    return np.asarray(array / np.linalg.norm(array, axis=1, keepdims=True))


@pytest.mark.parametrize("encoder", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize(("loss", "reference"), [("softmax", softmax_loss), ("sigmoid", sigmoid_loss)])
@pytest.mark.parametrize("chunk", [3, None])
def test_the_loss_is_the_papers(encoder: EncoderConfig, loss: str, reference: Any, chunk: int | None) -> None:
    """Value, and gradient of scale and bias, from the towers' own outputs."""
    model, batch = make(encoder, loss=loss, chunk=chunk), batch_of()
    assert batch.tokens is not None
    output = model(batch, CLOCK).loss
    output.backward()
    images = unit(model.encoder(batch.views[0]) @ model.image_projection.weight.T)
    texts = unit(model.text(batch.tokens))
    log_scale = model.logit_scale.item()
    bias = model.logit_bias.item() if loss == "sigmoid" else 0.0
    assert output.item() == pytest.approx(reference(images, texts, math.exp(log_scale), bias), rel=1e-5)

    def slope(of: Any) -> float:
        return float((of(1e-5) - of(-1e-5)) / 2e-5)

    assert model.logit_scale.grad is not None
    want = slope(lambda e: reference(images, texts, math.exp(log_scale + e), bias))
    assert model.logit_scale.grad.item() == pytest.approx(want, rel=1e-4)
    if loss == "sigmoid":
        assert model.logit_bias.grad is not None
        want = slope(lambda e: reference(images, texts, math.exp(log_scale), bias + e))
        assert model.logit_bias.grad.item() == pytest.approx(want, rel=1e-4)


def test_starting_values_are_the_papers() -> None:
    clip, siglip = make(), make(loss="sigmoid")
    assert clip.logit_scale.shape == siglip.logit_scale.shape == siglip.logit_bias.shape == (1,)
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert siglip.logit_scale.item() == pytest.approx(math.log(10)) and siglip.logit_bias.item() == -10
    assert not hasattr(clip, "logit_bias")


def test_neither_gains_nor_biases_nor_the_scale_decay() -> None:
    decayed, free = make(RESNET, loss="sigmoid").param_groups()
    assert decayed.weight_decay_scale == 1 and free.weight_decay_scale == 0
    names = {name for name, _ in free.parameters}
    assert {"logit_scale", "logit_bias", "encoder.bn1.weight", "text.ln_final.bias"} <= names
    assert {"text.text_projection", "image_projection.weight"} <= {name for name, _ in decayed.parameters}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_micro_batches_change_neither_loss_nor_gradient(loss: str) -> None:
    whole, batch = make(RESNET, loss=loss, batch_norm="grouped:4"), batch_of()
    cut = make(RESNET, {"accumulation": 2}, loss=loss, batch_norm="grouped:4")
    assert cut.micro_batch_size == 4
    statistics = {name: value.clone() for name, value in whole.named_buffers()}
    for model in (whole, cut):
        model(batch, CLOCK).loss.backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), cut.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (b.grad - a.grad).abs().max() <= 1e-4 * a.grad.abs().max(), name
    moved = dict(cut.named_buffers())["encoder.bn1.num_batches_tracked"]
    assert moved == statistics["encoder.bn1.num_batches_tracked"] + 2, "once for each micro-batch, not again"


def test_metrics_tell_a_collapse() -> None:
    model, batch = make(), batch_of()
    healthy = model(batch, CLOCK).metrics
    assert {"mean_cosine", "embedding_std", "effective_rank", "text_effective_rank", "positive_similarity",
            "negative_similarity", "top1", "logit_scale"} <= set(healthy)  # fmt: skip
    assert healthy["logit_scale"].item() == pytest.approx(1 / 0.07)
    torch.nn.init.zeros_(model.text.text_projection)
    model.text.text_projection.data[:, 0] = 1e-3
    collapsed = model(batch, CLOCK).metrics
    assert collapsed["text_effective_rank"] < 1.01 < healthy["text_effective_rank"]
    assert collapsed["text_embedding_std"] < healthy["text_embedding_std"]


@pytest.mark.parametrize(
    ("encoder", "context", "changes", "message"),
    [
        (
            VIT,
            {"vocabulary": 41},
            {},
            r"objective\.text\.vocabulary: found 40, .* knows 41 tokens",
        ),
        (VIT, {"text_length": 9}, {}, r"objective\.text\.context: found 8, .* texts of 9 tokens"),
        (RESNET, {"accumulation": 2}, {}, r"train\.micro_batch_size: found 4, .*batch_norm=rank"),
        (RESNET, {"accumulation": 2}, {"batch_norm": "sync"}, r"train\.micro_batch_size: .*batch_norm=sync"),
        (RESNET, {}, {"batch_norm": "grouped:3"}, r"objective\.batch_norm: found grouped:3, whose 3"),
    ],
)
def test_impossible_settings_are_one_line(
    encoder: EncoderConfig, context: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        make(encoder, context, **changes)


class Driven(CLIP):
    """Its loss only wants a larger scale, or a smaller one."""

    towards = 1.0

    def loss(self, embeddings: Embeddings, progress: Progress) -> LossOutput:
        output = super().loss(embeddings, progress)
        return output._replace(loss=output.loss * 0 - 5 * self.towards * self.logit_scale.sum())


class DrivenDown(Driven):
    towards = -1.0


def scale_after(stage: int, up: bool) -> list[float]:
    """The log scale after a step that drives it beyond its bound, and after one more of rate 0."""
    here = processes.start("cpu")
    # Wide enough for ZeRO-3 to take it apart.
    model = make(start_scale=90.0 if up else 1.5, text=TEXT | {"width": 400})
    model.__class__ = Driven if up else DrivenDown
    engine = deepspeed.initialize(
        model,
        lambda groups: torch.optim.SGD([{"params": [p for _, p in g.parameters]} for g in groups], lr=1.0),
        here,
        micro_batch=8 // here.world_size,
        zero_stage=stage,
    )
    found = []
    for step, rate in enumerate((1.0, 0.0)):
        share = list(batch_of().split(8 // here.world_size))[here.rank]
        output = engine.forward(share, CLOCK)
        engine.backward(output.loss)
        update = engine.step(StepSettings(lr=rate, weight_decay=0.0))
        assert update is not None
        model.after_step(update, Progress(step + 1, 0, 10, 100), output)
        with engine.whole_parameters() as whole:
            found.append(float(whole.get_parameter("logit_scale")))
    engine.close()
    processes.stop()
    return found


@pytest.mark.parametrize(
    ("stage", "up"), [(0, True), (1, True), (2, True), (3, True), (1, False), (3, False)]
)
def test_the_scale_is_bounded_in_the_master_too(ranks: Any, stage: int, up: bool) -> None:
    """By 100, and from below by 1 as in open_clip (train.py)."""
    for found in ranks(2, scale_after, stage=stage, up=up):
        assert found == [pytest.approx(math.log(100) if up else 0.0, abs=1e-6)] * 2


def test_without_a_projection_the_feature_is_the_embedding() -> None:
    model, batch = make(RESNET, width=16, projection=False), batch_of()
    images, _ = model.eval().embed(batch)
    np.testing.assert_allclose(images.detach().numpy(), unit(model.encoder(batch.views[0])), atol=1e-6)
    assert not any("image_projection" in name for name in model.state_dict())
    with pytest.raises(ConfigError, match=r"objective\.width: found 12, .* must be the 16 numbers"):
        make(RESNET, projection=False)


def test_a_tower_without_batch_norm_takes_any_micro_batch() -> None:
    assert make(VIT, {"accumulation": 4}).micro_batch_size == 2
