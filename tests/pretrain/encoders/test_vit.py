"""Patches, positions and visible tokens against formulas written out again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from configs.errors import ConfigError
from pretrain import encoders
from pretrain.encoders import EncoderConfig, vit


def small(**changes: object) -> EncoderConfig:
    arguments = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4} | changes
    return EncoderConfig(name="vit_tiny_patch16_224", args=arguments)


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_patchify_is_undone_and_keeps_pixels_together(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    patches = vit.patchify(images, (8, 4))
    assert isinstance(patches, Float[Tensor, f"2 {size[0] // 8 * size[1] // 4} 96"])
    assert torch.equal(vit.unpatchify(patches, (size[0] // 8, size[1] // 4), (8, 4)), images)
    first_of_second_row = images[0, :, 8:16, 0:4].permute(1, 2, 0).flatten()
    assert torch.equal(patches[0, size[1] // 4], first_of_second_row)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_sincos_positions(grid: tuple[int, int]) -> None:
    width = 16
    got = vit.sincos_positions(width, grid, prefix=1)[0].numpy()
    assert (got[0] == 0).all()
    for row in range(grid[0]):
        for column in range(grid[1]):
            omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
            expected = np.concatenate(
                [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            )
            np.testing.assert_allclose(got[1 + row * grid[1] + column], expected, atol=1e-7)
    with pytest.raises(ValueError, match="divisible by 4"):
        vit.sincos_positions(18, grid, 1)


def test_all_visible_in_order_is_the_plain_forward() -> None:
    encoder = encoders.build(small(), (16, 24)).eval()
    images = torch.randn(2, 3, 16, 24)
    everything = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(
        vit.encode_visible(encoder, images, everything), encoder.forward_features(images)
    )


def test_a_visible_token_keeps_its_place() -> None:
    """Permuting which tokens are kept permutes the output alike, as attention has no order of its own."""
    encoder = encoders.build(small(), (16, 24)).eval()
    images = torch.randn(1, 3, 16, 24)
    there, back = torch.tensor([[4, 1, 3]]), torch.tensor([[1, 3, 4]])
    one, other = vit.encode_visible(encoder, images, there), vit.encode_visible(encoder, images, back)
    torch.testing.assert_close(one[:, [0, 2, 3, 1]], other)


def test_pooling() -> None:
    images = torch.randn(2, 3, 16, 16)
    for pooling, of in (
        ("token", lambda tokens: tokens[:, 0]),
        ("avg", lambda tokens: tokens[:, 1:].mean(1)),
    ):
        encoder = encoders.build(small().model_copy(update={"pooling": pooling}), (16, 16)).eval()
        with torch.no_grad():
            encoder.norm.weight.uniform_(0.5, 2.0)  # so that norm and mean can't be exchanged
            tokens = encoder.forward_features(images)
            torch.testing.assert_close(encoders.features(encoder, images), of(tokens))


def test_unknown_names_and_arguments_are_one_line() -> None:
    with pytest.raises(ValueError, match="did you mean vit_base_patch16_224"):
        EncoderConfig(name="vit_base_patch16_225")
    with pytest.raises(ConfigError, match=r"encoder\.args: timm can't make .*colour") as caught:
        encoders.build(small(colour="red"), (16, 16))
    assert "\n" not in str(caught.value)
