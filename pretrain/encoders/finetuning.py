"""timm's own parts for training an encoder end to end as a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, RunError
from pretrain.encoders import EncoderConfig, arguments, build, is_vit
from pretrain.encoders.torchvision_compat import ensure_torchvision
from pretrain.encoders.weights import classifiers
from pretrain.objective import ParamGroup


def classifier(
    config: EncoderConfig,
    image_size: tuple[int, int],
    classes: int,
    weights: Mapping[str, Tensor],
    *,
    drop_path: float = 0.0,
) -> nn.Module:
    """The encoder with `weights` and a new linear layer on top: (B, channels, H, W) -> (B, classes) logits.

    As MAE's fine-tuning does it (arXiv:2111.06377 appendix A.1): a ViT that is pooled by the mean of its
    patches gets a fresh layer norm behind the pooling in place of the one before it, and the new layer starts
    near zero. Every other encoder keeps its pooling. Raises `RunError` where the weights are another
    network's, `ConfigError` where the architecture has no drop path.
    """
    chosen = classifier_arguments(config, image_size)
    if drop_path > 0:
        chosen.setdefault("drop_path_rate", drop_path)
    plain = config.model_copy(update={"args": chosen, "pooling": "token"})
    try:
        model = build(plain, image_size)
    except ConfigError as error:
        if drop_path > 0 and "drop_path_rate" in str(error):
            raise ConfigError(
                f"drop_path: found {drop_path}, and {config.name} has none; set drop_path=0"
            ) from error
        raise
    model.reset_classifier(classes)  # type: ignore[operator]
    lasts = classifiers(model)
    _load(model, config, weights, lasts, moved=_moves_norm(config, chosen))
    for last in lasts:
        head = model.get_submodule(last)
        if not isinstance(head, nn.Linear | nn.Conv2d):
            raise RunError(
                f"{config.name}: its classifier {last} is a {type(head).__name__}, not a linear layer"
            )
        nn.init.trunc_normal_(head.weight, std=2e-5)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    if is_vit(model) and model.pos_embed is not None:
        model.pos_embed.requires_grad_(True)  # fixed while it pretrained
    return model


def classifier_arguments(config: EncoderConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """What timm makes the classifier with: the encoder's arguments, and timm's own place of a mean's norm."""
    chosen = arguments(config, image_size)
    if _moves_norm(config, chosen):
        chosen.pop("fc_norm")
    return chosen


def _moves_norm(config: EncoderConfig, chosen: Mapping[str, Any]) -> bool:
    """Whether keel's own pooling by the mean, behind the norm, becomes timm's, in front of it."""
    return config.pooling == "avg" and chosen.get("global_pool") == "avg"


def _load(
    model: nn.Module, config: EncoderConfig, weights: Mapping[str, Tensor], lasts: Sequence[str], moved: bool
) -> None:
    try:
        found = model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        raise RunError(f"weights of another {config.name}: {' '.join(str(error).split())[:300]}") from error
    new = {f"{last}.{part}" for last in lasts for part in ("weight", "bias")}
    dropped: set[str] = set()
    if moved:
        new |= {"fc_norm.weight", "fc_norm.bias"}
        dropped = {"norm.weight", "norm.bias"}
    wrong = sorted((set(found.missing_keys) - new) | (set(found.unexpected_keys) - dropped))
    if wrong:
        raise RunError(
            f"weights of another network than {config.name}, whose features are pooled by {config.pooling}: "
            f"{', '.join(wrong[:5])}"
        )


def reopened(folder: Path) -> nn.Module:
    """The classifier in `folder` as timm opens it, in evaluation mode."""
    ensure_torchvision()
    import timm

    model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True)
    assert isinstance(model, nn.Module)
    return model.eval()


def layerwise_groups(model: nn.Module, layer_decay: float) -> list[ParamGroup]:
    """Groups whose rate falls by `layer_decay` a layer towards the input; no weight decay on vectors, tokens.

    The layers are timm's (`param_groups_layer_decay`): embeddings are one, every block is one, as in BEiT
    (arXiv:2106.08254) and MAE.
    """
    from timm.optim import param_groups_layer_decay

    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, 1.0, no_weight_decay_list=exempt, layer_decay=layer_decay)
    return [
        ParamGroup(
            [(names[id(parameter)], parameter) for parameter in group["params"]],
            weight_decay_scale=group["weight_decay"],
            lr_scale=group["lr_scale"],
        )
        for group in groups
    ]


def mixing(
    classes: int, *, mixup: float, cutmix: float, label_smoothing: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function of (B, 3, H, W) images, B even, and (B,) labels that blends pairs of both.

    Gives images and (B, classes) float32 targets. Draws from numpy's global generator, as timm's Mixup does.
    """
    from timm.data.mixup import Mixup

    probability = 1.0 if mixup or cutmix else 0.0
    mix = Mixup(mixup, cutmix, prob=probability, label_smoothing=label_smoothing, num_classes=classes)

    def apply(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        blended, target = mix(images.clone(), labels)
        return blended, target.to(torch.float32)

    return apply


def erasing(probability: float, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Random rectangles of (B, 3, H, W) normalised images become noise, in place; draws from `random`."""
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(probability, mode="pixel", device=device)  # type: ignore[no-any-return]
