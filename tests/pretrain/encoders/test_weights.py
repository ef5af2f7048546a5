"""Every layout of weights gives back its tensors; what doesn't fit is named; no file is executed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import RunError
from pretrain.encoders import EncoderConfig, build
from pretrain.encoders.weights import load

VIT = EncoderConfig(name="vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 2, "num_heads": 2})
RESNET = EncoderConfig(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})
SIZE = (32, 32)


def made(config: EncoderConfig, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    encoder = build(config, SIZE)
    for buffer in encoder.buffers():
        buffer.add_(1)  # running statistics are weights too
    return encoder


def under(prefix: str, encoder: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in encoder.state_dict().items()}


def official_mae(encoder: nn.Module) -> dict[str, Any]:
    extra = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 32)}
    return {"model": under("", encoder) | extra, "args": argparse.Namespace(lr=1.0), "epoch": 799}


def official_moco(encoder: nn.Module) -> dict[str, Any]:
    q, k = under("module.encoder_q.", encoder), under("module.encoder_k.", made(RESNET, 2))
    head = {"module.encoder_q.fc.0.weight": torch.ones(4, 4), "module.queue": torch.ones(4, 4)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": q | k | head}


def official_moco_v3(encoder: nn.Module) -> dict[str, Any]:
    slow = under("module.momentum_encoder.", made(VIT, 2))
    head = {"module.base_encoder.head.0.weight": torch.ones(4, 4), "module.predictor.0.weight": torch.ones(4)}
    return {"epoch": 300, "state_dict": under("module.base_encoder.", encoder) | slow | head}


@pytest.mark.parametrize(
    ("config", "content", "told"),
    [
        (VIT, official_mae, "MAE or plain, left out: decoder_embed, mask_token"),
        (RESNET, official_moco, "MoCo v1 or v2, left out: encoder_k, fc, queue"),
        (VIT, official_moco_v3, "MoCo v3, left out: head, momentum_encoder, predictor"),
        (VIT, lambda encoder: encoder.state_dict(), "MAE or plain, left out: nothing"),
        (RESNET, lambda encoder: {"state_dict": under("module.", encoder)}, "distributed, left out: nothing"),
        (
            VIT,
            lambda encoder: under("visual.trunk.", encoder) | {"logit_scale": torch.ones(())},
            "open_clip with timm's tower, left out: logit_scale",
        ),
        (  # as open_clip's training on several GPUs saves it
            VIT,
            lambda encoder: {
                "epoch": 3,
                "state_dict": under("module.visual.trunk.", encoder)
                | {"module.logit_scale": torch.ones(()), "module.transformer.x": torch.ones(1)},
            },
            "open_clip with timm's tower, left out: logit_scale, transformer",
        ),
    ],
)
def test_official_checkpoints(tmp_path: Path, config: EncoderConfig, content: Any, told: str) -> None:
    trained, encoder = made(config), made(config, 3)
    torch.save(content(trained), tmp_path / "weights.pth")
    loaded = load(encoder, str(tmp_path / "weights.pth"))
    assert told in str(loaded)
    for name, value in trained.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_clips_own_tower_gives_the_same_features(tmp_path: Path, prefix: str) -> None:
    import open_clip
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    tower = VisionTransformer(32, 8, 64, 2, 1, 4.0, output_dim=16)
    content = under(f"{prefix}visual.", tower) | {f"{prefix}logit_scale": torch.ones(())}
    torch.save({"state_dict": content, "name": "a run"}, tmp_path / "clip.pt")
    config = EncoderConfig(
        name="vit_base_patch32_clip_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    )
    encoder = build(config, SIZE).eval()
    load(encoder, str(tmp_path / "clip.pt"))
    tower.proj = None
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.allclose(encoder(images), tower.eval()(images), atol=1e-5), open_clip.__version__


def test_a_folder_of_timms_and_safetensors(tmp_path: Path) -> None:
    trained, encoder = made(VIT), made(VIT, 3)
    timm.models.save_for_hf(
        trained, tmp_path / "folder", model_args={**VIT.args, "img_size": 32}, safe_serialization=True
    )
    load(encoder, str(tmp_path / "folder"))
    assert torch.equal(encoder.state_dict()["cls_token"], trained.state_dict()["cls_token"])
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    load(other := made(VIT, 4), str(tmp_path / "weights.safetensors"))
    assert torch.equal(other.state_dict()["cls_token"], trained.state_dict()["cls_token"])


def test_positions_are_resampled_to_another_size(tmp_path: Path) -> None:
    trained, encoder = made(VIT), build(VIT, (64, 48))
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    assert str(load(encoder, str(tmp_path / "weights.pth"))).endswith("positions resampled to 4 x 3")
    assert encoder.state_dict()["pos_embed"].shape == (1, 4 * 3 + 1, 32)
    assert torch.equal(encoder.state_dict()["pos_embed"][:, 0], trained.state_dict()["pos_embed"][:, 0])


def test_what_doesnt_fit_is_named_and_nothing_changes(tmp_path: Path) -> None:
    encoder = made(VIT)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    wrong = made(VIT.model_copy(update={"args": {**VIT.args, "depth": 1}}), 2).state_dict()
    wrong["norm.weight"], wrong["blocks.7.extra"] = torch.ones(5), torch.ones(1)
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(RunError) as caught:
        load(encoder, str(tmp_path / "wrong.pth"))
    assert (
        "wrong.pth doesn't fit this encoder: lacks blocks.1.*; has unknown blocks.7.*; "
        "norm.weight is (5,) there and (32,) here; set encoder.name"
    ) in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Bomb.path),)

    path: Path


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    Bomb.path = tmp_path / "exploded"
    torch.save({"model": {"x": torch.ones(1)}, "bomb": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(RunError, match="without executing code"):
        load(made(VIT), str(tmp_path / "bomb.pth"))
    assert not Bomb.path.exists()


@pytest.mark.parametrize("name", ["no_such_model", "/no/such/file.pth"])
def test_an_unknown_source_is_a_line(name: str) -> None:
    with pytest.raises(RunError, match="neither a file, nor a folder, nor a name"):
        load(made(VIT), name)
