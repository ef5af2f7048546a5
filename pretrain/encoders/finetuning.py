"""timm's own parts for training an encoder end to end as a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import RunError
from pretrain.encoders import EncoderConfig, build, is_vit
from pretrain.types import ParamGroup


def classifier(
    config: EncoderConfig,
    image_size: tuple[int, int],
    classes: int,
    weights: Mapping[str, Tensor],
    *,
    drop_path: float = 0.0,
) -> nn.Module:
    """The encoder with `weights` and a new linear layer on top: (B, 3, H, W) -> (B, classes) logits.

    As MAE's fine-tuning does it (arXiv:2111.06377 appendix A.1): a ViT that is pooled by the mean of its
    patches gets a fresh layer norm behind the pooling in place of the one before it, and the new layer starts
    near zero. Raises `RunError` where the weights are another network's.
    """
    arguments = {"drop_path_rate": drop_path, **config.args}
    with torch.device("meta"):
        vit = is_vit(build(config, image_size))
    if vit:
        arguments["global_pool"] = config.pooling
    model = build(config.model_copy(update={"args": arguments}), image_size)
    model.reset_classifier(classes)  # type: ignore[operator]
    try:
        found = model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        raise RunError(f"weights of another {config.name}: {' '.join(str(error).split())[:300]}") from error
    last = str(model.pretrained_cfg["classifier"])  # type: ignore[index]
    new = {f"{last}.weight", f"{last}.bias"}
    dropped: set[str] = set()
    if vit and config.pooling == "avg":
        new |= {"fc_norm.weight", "fc_norm.bias"}
        dropped = {"norm.weight", "norm.bias"}
    wrong = sorted((set(found.missing_keys) - new) | (set(found.unexpected_keys) - dropped))
    if wrong:
        raise RunError(
            f"weights of another network than {config.name}, whose features are pooled by {config.pooling}: "
            f"{', '.join(wrong[:5])}"
        )
    head = model.get_submodule(last)
    assert isinstance(head, nn.Linear)
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    if is_vit(model):
        model.pos_embed.requires_grad_(True)  # fixed while it pretrained
    return model


def reopened(folder: Path) -> nn.Module:
    """The classifier in `folder` as timm opens it, in evaluation mode."""
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
