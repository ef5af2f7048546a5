"""Recipes against the code that they name, as it is installed: torchvision's ResNet, open_clip's networks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torchvision
from open_clip.transformer import VisionTransformer
from open_clip_train.scheduler import cosine_lr
from torch import Tensor, nn

from configs.loading import PACKAGED, load
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.encoders import EncoderConfig
from pretrain.export import open_clip_folder
from pretrain.objective import BuildContext
from pretrain.objectives.clip import CLIP

PUBLISHED = {
    "vitb32_laion400m": ("ViT-B-32", "laion400m_e32"),
    "vitb16_laion400m": ("ViT-B-16", "laion400m_e32"),
    "vitl14_laion400m": ("ViT-L-14", "laion400m_e32"),
    "vitb32_datacomp_s": ("ViT-B-32", "datacomp_s_s13m_b4k"),
    "vitb32_datacomp_m": ("ViT-B-32", "datacomp_m_s128m_b4k"),
}
"""open_clip's network and tag behind the figure that a config expects."""

DEPARTURES = {
    "moco/v1_resnet50_in1k_200ep": ("Departure: bf16", "fp32"),
    "moco/v2_resnet50_in1k_200ep": ("Departure: bf16", "fp32"),
    "moco/v2_resnet50_in1k_800ep": ("Departure: bf16", "fp32"),
    "moco_v3/vits16_in1k": ("the authors trained in fp16",),
    "moco_v3/resnet50_in1k": ("the authors trained in fp16",),
    "mae/vitb16_in1k_800ep": ("the authors trained in fp16",),
    "clip/vitb32_laion400m": ("Departure: ", "<start_of_text>"),
    "clip/siglip_vitb16": (
        "Departures: ",
        "WebLI",
        "causal text tower",
        "big_vision leaves it free",
        "timm's",
    ),
}
"""Where a recipe isn't the authors', its file says so."""


def recipe(name: str) -> RunConfig:
    return load(PACKAGED / f"{name}.yaml", RunConfig)


def built(name: str) -> CLIP:
    """On the current device, as before a run."""
    config = recipe(name)
    encoder = encoders.build(config.encoder, (224, 224))
    objective = config.objective.build(BuildContext(encoder, (224, 224), 10**6, 32, None))
    assert isinstance(objective, CLIP)
    return objective


@pytest.mark.parametrize("name", DEPARTURES)
def test_what_departs_is_said_in_the_recipe(name: str) -> None:
    text = (PACKAGED / f"{name}.yaml").read_text()
    assert all(words in text for words in DEPARTURES[name])


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("moco/v1_resnet50_in1k_200ep", False),
        ("moco/v2_resnet50_in1k_200ep", False),
        ("moco/v2_resnet50_in1k_800ep", False),
        ("moco_v3/resnet50_in1k", True),
    ],
)
def test_resnets_start_as_torchvision_draws_them(name: str, zero: bool) -> None:
    """main_moco.py of v1 and v2 takes torchvision's defaults, v3's zeros the last gain of every block."""
    config = recipe(name)
    torch.manual_seed(0)
    ours = encoders.build(config.encoder, (224, 224))
    theirs = torchvision.models.resnet50(zero_init_residual=zero)

    def of_kind(network: nn.Module, kind: type[nn.Module]) -> list[Tensor]:
        found = (m.weight for n, m in network.named_modules() if isinstance(m, kind) and "fc" not in n)
        return [weight.detach() for weight in found if isinstance(weight, Tensor)]

    gains, expected = (of_kind(network, nn.BatchNorm2d) for network in (ours, theirs))
    assert [float(g.sum()) for g in gains] == [float(g.sum()) for g in expected]
    assert sum(float(gain.abs().sum()) == 0 for gain in gains) == (16 if zero else 0)
    convolutions, expected = (of_kind(network, nn.Conv2d) for network in (ours, theirs))
    assert [c.shape for c in convolutions] == [c.shape for c in expected]
    for weight, other in zip(convolutions, expected, strict=True):
        assert float(weight.std() / other.std()) == pytest.approx(1, abs=6 / math.sqrt(weight.numel()))
        assert float(weight.abs().max() / weight.std()) > 3, "normal, not uniform"


def test_grey_comes_before_the_jitter_in_moco_v1_only() -> None:
    """main_moco.py: RandomGrayscale, ColorJitter; with --aug-plus ColorJitter, RandomGrayscale."""
    first = [recipe(f"moco/{name}").objective.views((224, 224))[0].grayscale_first for name in (
        "v1_resnet50_in1k_200ep", "v2_resnet50_in1k_200ep", "v2_resnet50_in1k_800ep"
    )]  # fmt: skip
    assert first == [True, False, False]


SMALL = EncoderConfig(
    name="vit_base_patch32_clip_224", args={"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
)
TEXT = {"vocabulary": 600, "context": 16, "width": 128, "depth": 2, "heads": 2}


def small(**changes: object) -> CLIP:
    from pretrain.objectives.clip import CLIPConfig

    torch.manual_seed(0)
    config = CLIPConfig.model_validate({"width": 64, "text": TEXT} | changes)
    context = BuildContext(encoders.build(SMALL, (64, 64)), (64, 64), 100, 8, None)
    return config.build(context)


def their_pair() -> nn.Module:
    torch.manual_seed(1)
    vision = {"image_size": 64, "patch_size": 8, "width": 192, "layers": 2, "head_width": 64}
    text = {"context_length": 16, "vocab_size": 600, "width": 128, "heads": 2, "layers": 2}
    return open_clip.CLIP(64, vision, text)


def under_their_names(pair: CLIP) -> dict[str, str]:
    """open_clip's name to keel's."""
    weights, _ = open_clip_folder._vit(pair.encoder)
    weights |= {"visual.proj": pair.image_projection.weight.detach()}
    weights |= dict(pair.text.named_parameters()) | {"logit_scale": pair.logit_scale}
    owners = {p.data_ptr(): name for name, p in pair.named_parameters()}
    return {theirs: owners.get(w.data_ptr(), "encoder.pos_embed") for theirs, w in weights.items()}


def test_clips_towers_start_as_open_clip_draws_them() -> None:
    """Deviation and largest entry of every tensor: normal or uniform, and how wide."""
    pair, theirs = small(), dict(their_pair().named_parameters())
    ours, names = dict(pair.named_parameters()), under_their_names(pair)
    assert names.keys() == theirs.keys()
    for name, other in theirs.items():
        own, other = ours[names[name]].detach(), other.detach()
        assert own.numel() == other.numel(), name
        if own.numel() < 64 or float(other.std()) == 0:
            torch.testing.assert_close(own.reshape(other.shape), other, msg=name)
            continue
        near = 6 / math.sqrt(own.numel())
        assert float(own.std() / other.std()) == pytest.approx(1, abs=near), name
        shapes = [float(x.abs().max() / x.std()) for x in (own, other)]
        assert (shapes[0] < 1.8) == (shapes[1] < 1.8), f"{name}: uniform or normal"


def test_what_decays_is_what_decays_in_open_clip() -> None:
    """The rule of open_clip_train/main.py on open_clip's own pair."""
    pair = small()
    names = under_their_names(pair)

    def exempt(name: str, p: Tensor) -> bool:
        return p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    expected = {names[name] for name, p in their_pair().named_parameters() if exempt(name, p)}
    free = {name for name, _ in pair.param_groups()[1].parameters}
    assert free == expected and "encoder.cls_token" in free and "encoder.pos_embed" not in free


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_are_those_of_the_published_figures(name: str) -> None:
    """Activation of both towers by open_clip's registry, shapes by its configuration."""
    network, tag = PUBLISHED[name]
    quick = bool(open_clip.get_pretrained_cfg(network, tag).get("quick_gelu", False))
    with torch.device("meta"):
        pair, theirs = built(f"clip/{name}"), open_clip.CLIP(**open_clip.get_model_config(network))
    assert encoders.parameter_count(pair) == encoders.parameter_count(theirs)
    assert pair.text.config.activation == ("quick_gelu" if quick else "gelu")
    x = torch.linspace(-4, 4, 100)
    blocks: Any = pair.encoder.blocks
    wanted = x * torch.sigmoid(1.702 * x) if quick else nn.functional.gelu(x)
    for activation in (blocks[0].mlp.act, pair.text.transformer.resblocks[0].mlp.gelu):
        torch.testing.assert_close(activation(x), wanted)


def test_siglips_tower_ends_with_its_pooling() -> None:
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    with torch.device("meta"):
        pair = built("clip/siglip_vitb16")
        tower: Any = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"])
    ours = {name: p.shape for name, p in pair.encoder.named_parameters()}
    assert ours == {name.removeprefix("trunk."): p.shape for name, p in tower.named_parameters()}
    assert not list(pair.image_projection.parameters())


def test_clips_rates_are_open_clips() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = cosine_lr(optimizer, base_lr=5e-4, warmup_length=2000, steps=10_000)
    settings = recipe("clip/vitb32_laion400m").optimizer.schedule_for(100, 10_000, 10_000)
    for step in (0, 1, 7, 1999, 2000, 2001, 6000, 9999):
        assert settings(Progress(step, 0, 10_000, 10_000)).lr == pytest.approx(theirs(step), rel=1e-12)
    assert settings(Progress(0, 0, 10_000, 10_000)).lr == 5e-4 / 2000


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_warm_up_begins_where_its_authors_does(path: Path) -> None:
    """open_clip's at the first part of the rate; MAE's (util/lr_sched.py) and MoCo v3's at 0."""
    if path.parent.name not in ("clip", "mae", "moco", "moco_v3", "demo", "smoke"):
        return
    config = load(path, RunConfig)
    contrasts_texts = "tokens" in config.objective.needs
    assert config.optimizer.warmup_from == ("one" if contrasts_texts else "zero")


def test_the_first_weights_of_another_image_tower_are_timms() -> None:
    """A tower that open_clip takes from timm, too: nothing is drawn again."""
    from pretrain.objectives.clip import CLIPConfig

    config = CLIPConfig.model_validate({"width": 64, "text": TEXT})
    args = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    for name, arguments in (
        ("vit_tiny_patch16_224", args | {"class_token": False, "global_pool": "avg"}),
        ("vit_small_patch16_18x2_224", args),  # two attentions side by side
        ("vit_tiny_r_s16_p8_224", {"embed_dim": 32, "depth": 1, "num_heads": 2}),  # patches by a ResNet
        ("resnet18", {}),
    ):
        encoder = encoders.build(EncoderConfig(name=name, args=arguments), (32, 32))
        before = {key: value.clone() for key, value in encoder.state_dict().items()}
        config.build(BuildContext(encoder, (32, 32), 100, 8, None))
        assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_a_vision_transformer_of_open_clips_has_no_other_parts() -> None:
    """What `initialise_as_open_clip` draws is all there is to draw."""
    tower = VisionTransformer(32, 8, 64, 2, 1, 4.0, output_dim=16)
    kinds = {type(m).__name__ for m in tower.modules() if list(m.parameters(recurse=False))}
    assert kinds == {
        "VisionTransformer", "Conv2d", "LayerNorm", "MultiheadAttention", "Linear",
        "NonDynamicallyQuantizableLinear",
    }  # fmt: skip
