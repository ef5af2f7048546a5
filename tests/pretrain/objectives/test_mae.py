"""MAE against an independent reference of a few lines, on square and non-square images."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from configs.errors import ConfigError
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.encoders import EncoderConfig
from pretrain.objective import BuildContext
from pretrain.objectives.mae import MAE, MAEConfig

SIZES = [(32, 32), (16, 40)]
CLOCK = Progress(step=0, samples=0, total_steps=10, dataset_size=100)


def make(size: tuple[int, int], **changes: object) -> MAE:
    torch.manual_seed(0)
    encoder = encoders.build(
        EncoderConfig(
            name="vit_tiny_patch16_224",
            args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
        ),
        size,
    )
    settings = {"decoder_width": 24, "decoder_depth": 2, "decoder_heads": 4} | changes
    context = BuildContext(encoder, size, dataset_size=100, batch_size=4, autocast=None)
    return MAEConfig.model_validate(settings).build(context)


def batch_of(size: tuple[int, int], count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(0, 2**62, (count,), generator=generator)
    return Batch((torch.randn(count, 3, *size, generator=generator),), seeds, torch.arange(count))


def reference_loss(mae: MAE, images: Tensor, order: Tensor, visible: int) -> Tensor:
    """The paper's loss, sample by sample, sharing only the modules with the code under test."""
    encoder, losses = mae.encoder, []
    for image, places in zip(images, order, strict=True):
        height, width = image.shape[1:]
        cut = [
            image[:, y : y + 8, x : x + 8].permute(1, 2, 0).reshape(-1)
            for y in range(0, height, 8)
            for x in range(0, width, 8)
        ]
        target = torch.stack(cut)
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6) ** 0.5
        embedded = encoder.patch_embed(image[None]) + encoder.pos_embed[:, 1:]
        tokens = [encoder.cls_token[0, 0] + encoder.pos_embed[0, 0]]
        tokens += [embedded[0, place] for place in places[:visible]]
        encoded = mae.decoder_embed(encoder.norm(encoder.blocks(torch.stack(tokens)[None])))[0]
        full = [mae.mask_token[0, 0]] * len(target)
        for slot, place in enumerate(places[:visible].tolist()):
            full[place] = encoded[1 + slot]
        sequence = torch.stack([encoded[0], *full]) + mae.decoder_positions[0]
        predicted = mae.decoder_predict(mae.decoder_norm(mae.decoder_blocks(sequence[None])))[0, 1:]
        hidden = places[visible:]
        losses.append(((predicted[hidden] - target[hidden]) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_equal_the_reference(size: tuple[int, int]) -> None:
    mae, batch = make(size), batch_of(size)
    order = mae.mask_order(batch.seeds)
    loss = mae(batch, CLOCK).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in mae.named_parameters() if p.grad is not None}
    mae.zero_grad()
    expected = reference_loss(mae, batch.views[0], order, mae.visible_count)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in mae.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_only_visible_tokens_enter_the_encoder(size: tuple[int, int]) -> None:
    mae, seen = make(size), []
    mae.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    mae(batch_of(size), CLOCK)
    patches = size[0] * size[1] // 64
    assert seen == [1 + patches // 4]


@pytest.mark.parametrize("size", SIZES)
def test_hidden_pixels_cannot_be_seen(size: tuple[int, int]) -> None:
    """Changing hidden pixels changes the target, never the prediction."""
    mae, batch = make(size), batch_of(size)
    before, _, masked = mae.reconstruct(batch)
    assert isinstance(masked, Bool[Tensor, "4 patches"])
    assert isinstance(before, Float[Tensor, "4 patches 192"])
    noise = torch.randn_like(before).masked_fill(~masked.unsqueeze(-1), 0)
    rows, columns = mae.grid
    change = noise.reshape(4, rows, columns, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(4, 3, *size)
    after, _, _ = mae.reconstruct(batch.with_views((batch.views[0] + change,)))
    assert torch.equal(before, after)


def test_exactly_the_trainable_parameters_get_gradients() -> None:
    mae = make((32, 32))
    mae(batch_of((32, 32)), CLOCK).loss.backward()
    gradients = {name: p.grad for name, p in mae.named_parameters() if p.grad is not None}
    with_gradient = {name for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    trainable = {name for name, p in mae.named_parameters() if p.requires_grad}
    assert with_gradient == trainable
    assert "encoder.pos_embed" not in trainable and "encoder.cls_token" in trainable


def test_weight_decay_groups_are_the_official_ones() -> None:
    mae = make((32, 32))
    decayed, free = mae.param_groups()
    names = {name for name, _ in decayed.parameters}
    assert {"encoder.cls_token", "mask_token", "encoder.patch_embed.proj.weight"} <= names
    assert all(name.endswith("weight") or name.endswith("token") for name in names)
    assert not any("norm" in name for name in names)
    assert free.weight_decay_scale == 0 and decayed.weight_decay_scale == 1
    assert len(names) + len(free.parameters) == sum(p.requires_grad for p in mae.parameters())


def test_masks_follow_the_sample_not_the_batch() -> None:
    mae, batch = make((32, 32)), batch_of((32, 32), 6)
    whole = mae.mask_order(batch.seeds)
    parts = torch.cat([mae.mask_order(part.seeds) for part in batch.split(2)])
    assert torch.equal(whole, parts)
    assert len({tuple(row.tolist()) for row in whole}) == 6


def test_masks_are_uniform() -> None:
    mae = make((32, 32))
    order = mae.mask_order(torch.arange(20_000) * 7919)
    frequency = torch.zeros(16).scatter_add_(0, order[:, :4].flatten(), torch.ones(80_000)) / 20_000
    assert (frequency - 0.25).abs().max() < 0.015  # five standard deviations of a binomial


def test_initialisation_is_the_official_one() -> None:
    mae = make((32, 32))
    weight = mae.encoder.patch_embed.proj.weight
    bound = (6 / (32 + 192)) ** 0.5
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert mae.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert all((m.bias == 0).all() for m in mae.modules() if isinstance(m, torch.nn.Linear))


def test_the_judge_knows_the_mean_patch() -> None:
    mae = make((32, 32), normalise_pixels=False)
    scores = mae.judge(batch_of((32, 32)))
    assert scores["mean_patch_error"].item() == pytest.approx(1.0, rel=0.1)  # variance of the random images
    assert scores["reconstruction_error"] > scores["mean_patch_error"]  # an untrained decoder


def test_pictures_are_images() -> None:
    picture = make((16, 40)).pictures(batch_of((16, 40)))["reconstructions"]
    assert isinstance(picture, Float[Tensor, "3 64 120"]) and picture.min() >= 0 and picture.max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.99}, r"objective\.mask_ratio: 0\.99 of 16 patches leaves 0 visible"),
        ({"decoder_heads": 5}, r"objective\.decoder_width: found 24"),
    ],
)
def test_impossible_settings_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make((32, 32), **changes)


def test_a_resnet_is_refused() -> None:
    encoder = encoders.build(EncoderConfig(name="resnet18"), (32, 32))
    with pytest.raises(ConfigError, match="needs a plain VisionTransformer"):
        MAEConfig().build(BuildContext(encoder, (32, 32), 100, 4, None))
