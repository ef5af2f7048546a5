"""A trained image-text pair as a folder that open_clip opens as "local-dir:FOLDER".

    FOLDER/open_clip_model.safetensors   both towers, the scale and, for the sigmoid loss, the bias
           open_clip_config.json         their shapes, and how images are prepared
           tokenizer.json, ...           unless the vocabulary is CLIP's own, which open_clip has
           README.md, loss.png           what it is and how to load it (`export_card`)

open_clip makes timm's networks by name only, without arguments, so that a ViT goes over as open_clip's own
VisionTransformer, which computes the same: a bias of the patch projection moves into the positions.
As with timm, the folder gets its name after a fresh process has opened it and computed the same embeddings.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import RunError
from data_pipeline.tokenize import open_tokenizer
from pretrain import encoders, export_card
from pretrain.encoders import torchvision_compat
from pretrain.encoders.text import TextTower
from pretrain.export import (
    TOLERANCE,
    ExportMismatchError,
    ExportResult,
    folder_for,
    save_weights,
    writing_to,
)
from pretrain.export_card import Card, Story
from pretrain.trained import Trained, read, read_objective

CAPTIONS = ("a small red star at the top left", "Two dogs, one cat!", "it's  3.5 °C — naïve café", "a " * 200)
"""What the tokens of the fresh process are compared on."""


class Pair(Protocol):
    """An objective with an image and a text tower in one space, such as objectives/clip.py."""

    encoder: nn.Module
    image_projection: nn.Linear
    text: TextTower
    logit_scale: nn.Parameter  # (1,) natural logarithm

    def embed_images(self, images: Tensor) -> Tensor: ...
    def embed_texts(self, tokens: Tensor) -> Tensor: ...


def export(
    run: Path, to: Path, *, step: int | None = None, force: bool = False, licence: str = "other"
) -> ExportResult:
    """Export both towers of a run's newest checkpoint, or that at `step`. Raises as `pretrain.export`."""
    trained = read(run, step)
    objective = read_objective(trained)
    if not isinstance(getattr(objective, "text", None), TextTower):
        raise RunError(
            f"{run}: was trained by {trained.config.objective.name}, which has no text tower; "
            "export with --format timm"
        )
    pair = cast(Pair, objective)
    with folder_for(to, force=force, ours="open_clip_config.json") as folder:
        with writing_to(to):
            _write(pair, trained, folder)
        difference = _verify(pair, trained, folder)
        with writing_to(to):
            story = Story(trained.facts(), trained.recipe(), trained.losses())
            export_card.write(_card(trained, difference, licence), story, folder)
    count = encoders.parameter_count(objective)
    return ExportResult(to, f"{trained.config.encoder.name} with a text tower", count, difference)


def _write(pair: Pair, trained: Trained, folder: Path) -> None:
    """Everything but the card."""
    weights, model = _image_tower(pair, trained)
    weights |= _text_tower(pair)
    weights["logit_scale"] = pair.logit_scale.detach().reshape(())
    if (bias := getattr(pair, "logit_bias", None)) is not None:
        weights["logit_bias"] = bias.detach().reshape(())
        model["init_logit_bias"] = bias.item()
    tokenizer = _write_tokenizer(trained, folder)
    model["text_cfg"] = _text_config(pair) | tokenizer
    config = {"model_cfg": model, "preprocess_cfg": _preprocessing(trained), "keel": trained.facts()}
    save_weights(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _image_tower(pair: Pair, trained: Trained) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under open_clip's names, and `model_cfg` without the text."""
    config, size = trained.config.encoder, list(trained.image_size)
    embedding = pair.image_projection.out_features
    if trained.view.grey:
        raise RunError(
            "encoder.args.in_chans: found 1; open_clip's towers take RGB; export with --format timm"
        )
    if encoders.is_vit(pair.encoder):
        weights, vision = _vit(pair.encoder)
        weights["visual.proj"] = pair.image_projection.weight.detach().T
        quick = "quickgelu" in config.name or config.args.get("act_layer") == "quick_gelu"
        if quick:
            raise RunError(
                "encoder: open_clip's quick_gelu is for both towers at once, and keel's text tower has the "
                "exact GELU; export with --format timm"
            )
        return weights, {"embed_dim": embedding, "vision_cfg": {**vision, "image_size": size}}
    if config.args:
        raise RunError(
            f"encoder.args: found {config.args}; open_clip makes timm's {config.name} by its name only; "
            "export with --format timm"
        )
    weights = {f"visual.trunk.{name}": value for name, value in pair.encoder.state_dict().items()}
    weights["visual.head.proj.weight"] = pair.image_projection.weight.detach()
    vision = {"timm_model_name": config.name, "timm_pool": "avg", "timm_proj": "linear", "image_size": size}
    return weights, {"embed_dim": embedding, "vision_cfg": vision, "custom_text": False}


def _vit(encoder: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """timm's VisionTransformer as open_clip's (the inverse of timm's own conversion)."""
    own: Mapping[str, Tensor] = encoder.state_dict()
    width, depth = encoder.embed_dim, len(encoder.blocks)
    if encoder.num_prefix_tokens != 1 or not isinstance(encoder.fc_norm, nn.Identity):
        raise RunError(
            "encoder: open_clip's image tower has one class token, and pools by it or by the mean of the patches "
            "behind the norm; export with --format timm"
        )
    positions = own["pos_embed"][0].clone()
    if "patch_embed.proj.bias" in own:
        positions[1:] += own["patch_embed.proj.bias"]
    weights = {
        "visual.class_embedding": own["cls_token"][0, 0],
        "visual.positional_embedding": positions,
        "visual.conv1.weight": own["patch_embed.proj.weight"],
    }
    names = {"norm_pre.": "ln_pre.", "norm.": "ln_post."}
    for number in range(depth):
        block, theirs = f"blocks.{number}.", f"transformer.resblocks.{number}."
        names |= {
            f"{block}norm1.": f"{theirs}ln_1.", f"{block}norm2.": f"{theirs}ln_2.",
            f"{block}attn.qkv.weight": f"{theirs}attn.in_proj_weight",
            f"{block}attn.qkv.bias": f"{theirs}attn.in_proj_bias",
            f"{block}attn.proj.": f"{theirs}attn.out_proj.",
            f"{block}mlp.fc1.": f"{theirs}mlp.c_fc.", f"{block}mlp.fc2.": f"{theirs}mlp.c_proj.",
            f"{block}ls1.gamma": f"{theirs}ls_1.gamma", f"{block}ls2.gamma": f"{theirs}ls_2.gamma",
        }  # fmt: skip
    rest = own.keys() - {"pos_embed", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for name in sorted(rest):
        before = next((prefix for prefix in names if name.startswith(prefix)), None)
        if before is None:
            raise RunError(
                f"encoder: open_clip's image tower has no place for {name}; export with --format timm"
            )
        weights["visual." + names[before] + name.removeprefix(before)] = own[name]
    vision = {
        "layers": depth,
        "width": width,
        "head_width": width // encoder.blocks[0].attn.num_heads,
        "mlp_ratio": encoder.blocks[0].mlp.fc1.out_features / width,
        "patch_size": encoder.patch_embed.patch_size[0],
        "no_ln_pre": isinstance(encoder.norm_pre, nn.Identity),
        "norm_kwargs": {"eps": encoder.norm.eps},
    }
    if encoder.global_pool == "avg":
        vision["pool_type"] = "avg"  # behind the norm, as keel's
    if "blocks.0.ls1.gamma" in own:
        vision["ls_init_value"] = 1e-5  # any number: it makes the layers, whose weights are then loaded
    return weights, vision


def _text_tower(pair: Pair) -> dict[str, Tensor]:
    return {name: value for name, value in pair.text.state_dict().items() if name != "attn_mask"}


def _text_config(pair: Pair) -> dict[str, Any]:
    config = pair.text.config
    return {
        "context_length": config.context, "vocab_size": config.vocabulary, "width": config.width,
        "heads": config.heads, "layers": config.depth,
    }  # fmt: skip


def _preprocessing(trained: Trained) -> dict[str, Any]:
    """open_clip scales the shorter side to the image size and crops the center."""
    view = trained.view
    return {
        "size": list(view.size), "mode": "RGB", "mean": list(view.mean), "std": list(view.std),
        "interpolation": view.interpolation, "resize_mode": "shortest",
    }  # fmt: skip


def _write_tokenizer(trained: Trained, folder: Path) -> dict[str, Any]:
    """The tokenizer as transformers reads it, by which open_clip does; gives its place in `text_cfg`."""
    config = trained.config.data.tokenizer
    assert config is not None
    if config.path == "openai":
        return {}
    if not config.path.is_file():
        raise RunError(f"data.tokenizer.path: {config.path} is gone; put the run's tokenizer back")
    (folder / "tokenizer.json").write_bytes(config.path.read_bytes())
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context,
        "bos_token": config.start, "eos_token": config.end,
        # The text's feature is taken at its first END, and what follows isn't looked at.
        "pad_token": config.end,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    return {"hf_tokenizer_name": "."}


def _verify(pair: Pair, trained: Trained, folder: Path) -> float:
    """Largest absolute difference of an embedding, fresh process against the trained towers."""
    assert trained.config.data.tokenizer is not None, "an image-text objective needs one"
    tokenizer = open_tokenizer(trained.config.data.tokenizer)
    images = torch.randn(2, 3, *trained.image_size, generator=torch.Generator().manual_seed(0))
    tokens = torch.from_numpy(tokenizer.encode_all(CAPTIONS))
    with torch.no_grad():
        expected = {"images": pair.embed_images(images), "texts": pair.embed_texts(tokens)}
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({"images": images, "tokens": tokens}, inputs)
        Path(scratch, "captions.json").write_text(json.dumps(CAPTIONS))
        script = Path(__file__).with_name("export_reopen_open_clip.py")
        command = [sys.executable, "-P", str(script), str(folder.absolute()), scratch]
        command += [str(torchvision_compat.__file__)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise ExportMismatchError(f"a fresh process can't open the export:\n{done.stderr[-4000:]}")
        got = load_file(outputs)
    if "tokens" in got and not torch.equal(_ended(got["tokens"]), _ended(tokens)):
        raise ExportMismatchError("open_clip's tokenizer cuts the same captions otherwise")
    difference = max(float((got[name] - value).abs().max()) for name, value in expected.items())
    if not difference < TOLERANCE:  # so that NaN fails too
        raise ExportMismatchError(
            f"embeddings differ by {difference:.2e}, allowed is less than {TOLERANCE:.0e}"
        )
    return difference


def _ended(tokens: Tensor) -> Tensor:
    """Tokens with everything behind the first highest one, the end, put to 0."""
    end = tokens.argmax(dim=1, keepdim=True)
    return torch.where(torch.arange(tokens.shape[1])[None] <= end, tokens, 0)


def _card(trained: Trained, difference: float, licence: str) -> Card:
    return Card(
        title=f"{trained.config.encoder.name} with a text tower, pretrained with keel",
        library="open_clip",
        tags=("image-feature-extraction", "zero-shot-image-classification", "open_clip"),
        licence=licence,
        loading=(
            "import open_clip\n"
            'model, preprocess = open_clip.create_model_from_pretrained("local-dir:path/to/this/folder")\n'
            'tokenizer = open_clip.get_tokenizer("local-dir:path/to/this/folder")'
        ),
        note="`preprocess` prepares images as the run's evaluations did.",
        difference=difference,
    )
