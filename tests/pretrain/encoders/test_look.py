"""What an encoder makes of a picture: width, sizes it sees whole, channels; and a CPU that must not die."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from pretrain import encoders
from pretrain.encoders import EncoderConfig, look

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
CONV = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


def built(name: str, size: tuple[int, int] = (32, 32), pooling: Any = "token", **args: Any) -> nn.Module:
    return encoders.build(EncoderConfig(name=name, args=args, pooling=pooling), size)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenetv3_small_050", {}),  # num_features is that of the last map
        ("lcnet_035", {}),
        ("resnet18", CONV | {"global_pool": "catavgmax"}),
        ("ghostnet_050", {}),
        ("vit_tiny_patch16_224", VIT),
    ],
)
def test_the_width_is_that_of_the_feature(name: str, args: dict[str, Any]) -> None:
    encoder = built(name, **args).eval()
    with torch.no_grad():
        found = encoders.features(encoder, torch.randn(2, 3, 32, 32))
    assert found.shape == (2, encoders.width(encoder))
    with torch.device("meta"):
        assert encoders.width(built(name, **args)) == found.shape[1]


@pytest.mark.parametrize(
    ("name", "args", "size", "told"),
    [
        ("vit_tiny_patch16_224", VIT, (36, 32), "36 x 32 pixels aren't whole patches of 8 x 8"),
        ("eva02_tiny_patch14_224", {"depth": 1}, (40, 40), "use a multiple of 14, such as 42 x 42"),
        ("beit_base_patch16_224", {"depth": 1}, (40, 40), "use a multiple of 16, such as 48 x 48"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}, (34, 34), "a multiple of 4, such as 36 x 36"),
        (
            "convnext_atto",
            {"depths": (1, 1, 1, 1)},
            (48, 48),
            "an inner map of 3 x 3, which isn't whole pieces of 2",
        ),
        (
            "vit_small_patch16_dinov3",
            {"depth": 1},
            (40, 40),
            "can't take 40 x 40 pixels: .*use a multiple of 16",
        ),
    ],
)
def test_pictures_that_would_be_cut_are_refused(
    name: str, args: dict[str, Any], size: tuple[int, int], told: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.image_size: .*{told}") as caught:
        built(name, size, **args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [32, 33, 48])
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1)}),
        ("resnet18d", CONV),
        ("poolformer_s12", {}),
    ],
)
def test_what_is_let_through_sees_every_pixel(name: str, args: dict[str, Any], side: int) -> None:
    """The gradient of the feature reaches every pixel, or the size is refused; ResNets take every size."""
    try:
        encoder = built(name, (side, side), **args).eval()
    except ConfigError:
        assert name == "convnext_atto" and side % 32, f"{name} is refused at {side}"
        return
    torch.manual_seed(0)
    for layer in encoder.modules():  # nothing may be hidden behind a scale or a gate that starts at zero
        for parameter in layer.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.1)
    # Several: behind one picture's pixel all rectifiers may be shut.
    images = torch.randn(8, 3, side, side, dtype=torch.float64, requires_grad=True)
    encoder.double()(images).square().sum().backward()
    assert images.grad is not None and (images.grad.abs().sum((0, 1)) > 0).all()


def test_maps_and_tokens_are_no_feature() -> None:
    for args in ({"features_only": True}, {"global_pool": ""}):
        with pytest.raises(ConfigError, match=r"^encoder\.args: .* of a picture, not one feature vector"):
            built("resnet18", **CONV, **args)


def test_what_cannot_run_on_the_meta_device_is_looked_at_for_real() -> None:
    class Odd(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, : int(images.new_ones(1).item()) + 4]

    state = torch.get_rng_state()
    assert look.look(Odd, 3, (8, 8)).width == 5
    assert torch.equal(torch.get_rng_state(), state)


def test_building_draws_what_it_drew_before() -> None:
    """The look at a twin must not move the generator, or every run would start from other weights."""
    torch.manual_seed(3)
    encoder = built("vit_tiny_patch16_224", **VIT)
    torch.manual_seed(3)
    plain = encoders._timm().create_model("vit_tiny_patch16_224", num_classes=0, img_size=(32, 32), **VIT)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        (
            "vit_tiny_patch16_224",
            {"global_pool": "map"},
            "is the mean of a ViT's patches .*'global_pool': 'map'",
        ),
        (
            "vit_tiny_patch16_224",
            {"global_pool": "avg"},
            "is the mean of a ViT's patches behind its last norm",
        ),
        (
            "eva02_tiny_patch14_224",
            {"depth": 1, "global_pool": "token"},
            "eva02_tiny_patch14_224 pools by token",
        ),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, "pools by a way of its own"),
    ],
)
def test_a_pooling_that_would_be_ignored_is_refused(name: str, args: dict[str, Any], told: str) -> None:
    size = (28, 28) if "14" in name else (32, 32)
    with pytest.raises(ConfigError, match=rf"^encoder\.pooling: avg {told}|^encoder\.pooling: avg .*{told}"):
        built(name, size, "avg", **args)


def test_pooling_of_what_always_pools_so() -> None:
    assert encoders.width(built("resnet18", pooling="avg", **CONV)) == 16
    assert encoders.width(built("eva02_tiny_patch14_224", (28, 28), "avg", depth=1)) == 192


def test_channels() -> None:
    grey = EncoderConfig(name="resnet18", args={**CONV, "in_chans": 1})
    assert grey.channels == 1
    found = encoders.features(encoders.build(grey, (32, 32)).eval(), torch.randn(2, 1, 32, 32))
    assert found.shape == (2, 16)
    with pytest.raises(ConfigError, match=r"^encoder\.args\.in_chans: found 4; allowed: 3 \(RGB\) or 1"):
        built("resnet18", **CONV, in_chans=4)


def test_channels_last_does_not_kill_the_process() -> None:
    """torch's CPU convolution of 1 x 1 with a stride over a picture's channels writes beyond its memory."""
    code = """
        import torch
        from pretrain import encoders
        from pretrain.encoders import EncoderConfig
        torch.set_num_threads(1)
        encoder = encoders.build(EncoderConfig(name="repvgg_a0"), (32, 32))
        for _ in range(3):
            encoders.features(encoder, torch.randn(2, 3, 32, 32)).sum().backward()
        print("alive")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-500:]


def test_channels_last_is_kept_where_it_is_safe() -> None:
    orders = []
    encoder = built("resnet18", layers=[1, 1, 1, 1], channels=[16, 16, 16, 16])
    encoder.register_forward_pre_hook(lambda _, given: orders.append(given[0].is_contiguous()))
    encoders.features(encoder, torch.randn(2, 3, 32, 32))
    assert orders == [False]


def test_what_is_drawn_by_chance_is_told() -> None:
    assert encoders.chances(built("vit_tiny_patch16_224", **VIT)) == ""
    told = encoders.chances(
        built("vit_tiny_patch16_224", **VIT | {"depth": 2}, drop_path_rate=0.2, proj_drop_rate=0.1)
    )
    assert told in (
        "dropout (up to 0.1), drop path (up to 0.2)",
        "drop path (up to 0.2), dropout (up to 0.1)",
    )
