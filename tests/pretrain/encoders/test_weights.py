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
    assert ", positions resampled to 4 x 3; " in str(load(encoder, str(tmp_path / "weights.pth")))
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


def saved_vit(folder: Path, size: tuple[int, int], **args: Any) -> tuple[nn.Module, EncoderConfig]:
    """A ViT for images of `size` in a timm folder, and its config without the size."""
    config = VIT.model_copy(update={"args": {**VIT.args, **args}})
    torch.manual_seed(5)
    trained = build(config, size)
    timm.models.save_for_hf(
        trained, folder, model_args={**config.args, "img_size": size}, safe_serialization=True
    )
    return trained, config


def resampled(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """What a table of positions on one grid is on another, spelt out."""
    map = table[0, prefix:].T.reshape(1, -1, *old)
    made = nn.functional.interpolate(map, new, mode="bicubic", antialias=True)
    return torch.cat([table[0, :prefix], made[0].flatten(1).T])[None]


@pytest.mark.parametrize("args", [{}, {"no_embed_class": True}, {"no_embed_class": True, "reg_tokens": 3}])
@pytest.mark.parametrize(
    ("size", "other"),
    [
        ((64, 256), (128, 128)),  # 4 x 16 and 8 x 8: tables of one shape
        ((64, 256), (128, 512)),
        ((64, 128), (128, 256)),
        ((128, 128), (64, 256)),
        ((128, 128), (256, 64)),
        ((64, 256), (64, 256)),
    ],
)
def test_positions_of_any_grid(
    tmp_path: Path, args: dict[str, Any], size: tuple[int, int], other: tuple[int, int]
) -> None:
    trained, config = saved_vit(tmp_path / "folder", size, **args)
    old, new = ((side[0] // 16, side[1] // 16) for side in (size, other))
    prefix = 0 if args else 1
    expected = trained.pos_embed if old == new else resampled(trained.pos_embed, old, new, prefix)  # type: ignore[arg-type]
    for source in ("folder", "folder/model.safetensors"):  # beside a file lies what it doesn't say
        encoder = build(config, other)
        loaded = load(encoder, str(tmp_path / source))
        torch.testing.assert_close(encoder.pos_embed, expected)
        assert loaded.grid == (None if old == new else new)


def test_a_file_that_does_not_say_its_grid(tmp_path: Path) -> None:
    file = str(tmp_path / "bare.pth")
    trained = build(VIT, (64, 256))
    torch.save(trained.state_dict(), file)
    square = build(VIT, (128, 128))
    assert "64 positions taken as a square of 8 x 8, which a file doesn't say" in str(load(square, file))
    loaded = load(square, file, (64, 256))
    assert loaded.grid == (8, 8) and not loaded.notes
    torch.testing.assert_close(square.pos_embed, resampled(trained.pos_embed, (4, 16), (8, 8), 1))  # type: ignore[arg-type]
    with pytest.raises(
        RunError, match=r"64 positions, and a file doesn't say .* 4 x 16: .*encoder\.weights_size"
    ):
        load(build(VIT, (64, 256)), file)
    load(same := build(VIT, (64, 256)), file, (64, 256))
    assert torch.equal(same.pos_embed, trained.pos_embed)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"64 positions beside 1 for tokens, which aren't the 5 x 5"):
        load(square, file, 80)
    torch.save(build(VIT, (64, 128)).state_dict(), file)
    with pytest.raises(RunError, match=r"32 positions, and a file doesn't say"):
        load(square, file)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_several_processes_and_compilers_save(tmp_path: Path, wrapper: str) -> None:
    """open_clip's epoch_N.pt of several ranks, for one."""
    trained = made(VIT)
    state = under(f"{wrapper}visual.trunk.", trained) | {f"{wrapper}logit_scale": torch.ones(())}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    encoder = made(VIT, 3)
    assert "open_clip with timm's tower, left out: logit_scale" in str(
        load(encoder, str(tmp_path / "epoch_3.pt"))
    )
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("tinynet_e", {}),
        ("densenet121", {"block_config": (1, 1), "growth_rate": 8}),
        ("mobilenetv3_small_050", {}),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 24, "img_size": 32}),
    ],
)
def test_a_classifier_in_a_file_is_left_out(tmp_path: Path, name: str, args: dict[str, Any]) -> None:
    whole = timm.create_model(name, num_classes=10, **args)
    torch.save(whole.state_dict(), tmp_path / "classifier.pth")
    encoder = build(EncoderConfig(name=name, args=args), SIZE)
    loaded = load(encoder, str(tmp_path / "classifier.pth"))
    assert loaded.left_out
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_had_diverged_is_refused(tmp_path: Path, value: float) -> None:
    trained, encoder = made(VIT), made(VIT, 3)
    before = encoder.state_dict()["norm.weight"].clone()
    trained.state_dict()["norm.weight"][3] = value
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(RunError, match=r"1 of its tensors hold NaN or infinity, such as norm\.weight"):
        load(encoder, str(tmp_path / "weights.pth"))
    assert torch.equal(encoder.state_dict()["norm.weight"], before)


def test_a_norm_behind_the_pooling_is_another_network_from_files_and_folders(tmp_path: Path) -> None:
    trained, config = saved_vit(tmp_path / "folder", SIZE, global_pool="avg")
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    for source in ("folder", "weights.pth"):
        with pytest.raises(RunError, match=r"has unknown fc_norm\.\*; its last norm is behind the pooling"):
            load(made(VIT), str(tmp_path / source))
        load(encoder := build(config, SIZE), str(tmp_path / source))
        assert torch.equal(encoder.fc_norm.weight, trained.fc_norm.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"num_heads": 4}, r"blocks\.0\.attn is of 2 heads there and of 4 heads here"),
        ({"act_layer": "quick_gelu"}, r"blocks\.0\.mlp\.act is GELU there and QuickGELU here"),
    ],
)
def test_networks_of_the_same_shapes_that_compute_something_else(
    tmp_path: Path, args: dict[str, Any], told: str
) -> None:
    saved_vit(tmp_path / "folder", SIZE)
    other = VIT.model_copy(update={"args": {**VIT.args, **args}})
    with pytest.raises(RunError, match=told):
        load(build(other, SIZE), str(tmp_path / "folder"))


def test_the_activation_of_clips_files(tmp_path: Path) -> None:
    from open_clip.transformer import VisionTransformer

    tower = under("visual.", VisionTransformer(32, 8, 64, 2, 1, 4.0, output_dim=16))
    args = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    exact = build(EncoderConfig(name="vit_base_patch32_clip_224", args=args), SIZE)
    quick = build(EncoderConfig(name="vit_base_patch32_clip_quickgelu_224", args=args), SIZE)
    file = str(tmp_path / "clip.pt")
    torch.save(tower, file)
    assert "this encoder has the exact GELU" in str(load(exact, file))
    assert "this encoder has the quick GELU" in str(load(quick, file))
    openai = {name: torch.tensor(8) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(tower | openai, file)
    assert "GELU" not in str(load(quick, file))
    with pytest.raises(RunError, match=r"OpenAI's CLIP, whose activation is the quick GELU.*quickgelu"):
        load(exact, file)
