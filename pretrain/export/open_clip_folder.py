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

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import RunError
from data_pipeline.tokenize import open_tokenizer
from pretrain import encoders
from pretrain.encoders.text import QuickGELU, TextTower
from pretrain.export import card
from pretrain.export.card import Card, Story
from pretrain.export.check import ExportMismatchError, largest_difference, require_finite
from pretrain.export.timm_folder import ExportResult, folder_for, require_importable, save_weights, writing_to
from pretrain.run.trained import Trained, read, read_objective

CAPTIONS = (
    "a small red star at the top left", "Two dogs, one cat!", "it's 3.5 °C — naïve café", "赤い円 😀",
    "a " * 200, "a red circle &amp;amp; more", "  a   red\tcircle \n", "\uff57\uff49\uff44\uff45 letters",
    "schÃ¶n kaputt", "a b\u200b c", "<|endoftext|> hi", "",
)  # fmt: skip
"""What the tokens of the fresh process are compared on: clean ones, and such as open_clip cleans."""


class Pair(Protocol):
    """An objective with an image and a text tower in one space, such as objectives/clip.py."""

    encoder: nn.Module
    image_projection: nn.Module  # linear, or nothing where the tower's feature is the embedding
    text: TextTower
    logit_scale: nn.Parameter  # (1,) natural logarithm

    def embed_images(self, images: Tensor) -> Tensor: ...
    def embed_texts(self, tokens: Tensor) -> Tensor: ...


def export(
    run: Path, to: Path, *, step: int | None = None, force: bool = False, licence: str = "other"
) -> ExportResult:
    """Export both towers of a run's newest checkpoint, or that at `step`. Raises as `timm_folder.export`."""
    require_importable()
    if importlib.util.find_spec("open_clip") is None:
        raise RunError(
            "--format open_clip: needs the package open_clip_torch; install keel's extra open-clip"
        )
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
        difference, tokens = _verify(pair, trained, folder)
        remarks = _remarks(trained, tokens)
        with writing_to(to):
            story = Story(trained.facts(), trained.recipe(), trained.losses())
            card.write(_card(trained, difference, remarks, licence), story, folder)
    count = encoders.parameter_count(objective)
    return ExportResult(to, f"{trained.config.encoder.name} with a text tower", count, difference, remarks)


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
    if trained.view.grey:
        raise RunError(
            "encoder.args.in_chans: found 1; open_clip's towers take RGB; export with --format timm"
        )
    size, projection = list(trained.image_size), pair.image_projection
    linear = projection.weight.detach() if isinstance(projection, nn.Linear) else None
    # One switch for both towers; a tower of timm's is as timm has it.
    common = {"embed_dim": pair.text.text_projection.shape[1], "quick_gelu": _quick(pair)}
    if linear is not None and encoders.is_vit(pair.encoder) and pair.encoder.attn_pool is None:
        weights, vision = _vit(pair.encoder)
        if _activation(pair.encoder) != pair.text.config.activation:
            raise RunError(
                f"encoder: its activation is {_activation(pair.encoder)}, the text tower's "
                f"{pair.text.config.activation}, and open_clip has one of gelu and quick_gelu for both "
                "towers; export with --format timm"
            )
        return weights | {"visual.proj": linear.T}, {**common, "vision_cfg": {**vision, "image_size": size}}
    weights = {f"visual.trunk.{name}": value for name, value in pair.encoder.state_dict().items()}
    if linear is not None:
        weights["visual.head.proj.weight"] = linear
    vision = _of_timm(pair.encoder, trained) | {"timm_proj": "none" if linear is None else "linear"}
    return weights, {**common, "vision_cfg": {**vision, "image_size": size}, "custom_text": False}


def _of_timm(encoder: Any, trained: Trained) -> dict[str, Any]:
    """`vision_cfg` of a network that open_clip asks timm for."""
    config, pooled = trained.config.encoder, encoders.is_vit(encoder)
    if config.args:
        raise RunError(
            f"encoder.args: found {config.args}; open_clip makes timm's {config.name} by its name only; "
            "export with --format timm"
        )
    if pooled and encoder.attn_pool is None:
        raise RunError(
            "objective.projection: found false; open_clip's own image tower has one; "
            "export with --format timm"
        )
    if pooled and tuple(encoder.pretrained_cfg["input_size"][1:]) != tuple(trained.image_size):
        raise RunError(
            f"data.image_size: found {trained.image_size}; open_clip makes timm's {config.name} for "
            f"{encoder.pretrained_cfg['input_size'][1:]} only; export with --format timm"
        )
    return {"timm_model_name": config.name, "timm_pool": "map" if pooled else "avg"}


def _quick(pair: Pair) -> bool:
    return pair.text.config.activation == "quick_gelu"


def _activation(encoder: Any) -> str:
    """What lies between the two layers of a ViT's MLP, by what it computes."""
    activation, x = encoder.blocks[0].mlp.act, torch.linspace(-4, 4, 101)
    known = {"gelu": functional.gelu(x), "quick_gelu": QuickGELU()(x)}
    found = [name for name, values in known.items() if torch.allclose(activation(x), values, atol=1e-6)]
    return found[0] if found else type(activation).__name__


def _vit(encoder: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """timm's VisionTransformer as open_clip's (the inverse of timm's own conversion)."""
    own: Mapping[str, Tensor] = encoder.state_dict()
    width, depth = encoder.embed_dim, len(encoder.blocks)
    if encoder.num_prefix_tokens != 1 or not isinstance(encoder.fc_norm, nn.Identity):
        raise RunError(
            "encoder: open_clip's image tower has one class token, and pools by it or by the mean of the "
            "patches "
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
        "split_special_tokens": True,  # a caption that holds their names is mere text
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    return {"hf_tokenizer_name": "."}


def _verify(pair: Pair, trained: Trained, folder: Path) -> tuple[float, Tensor | None]:
    """Largest absolute difference of an embedding, fresh process against the trained towers.

    Also the tokens that it made of `CAPTIONS`, where it could: those of the cleaned captions, or this raises.
    """
    images = torch.randn(2, 3, *trained.image_size, generator=torch.Generator().manual_seed(0))
    tokens = _encoded(trained)
    with torch.no_grad():
        expected = {"images": pair.embed_images(images), "texts": pair.embed_texts(tokens)}
    require_finite(expected)
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({"images": images, "tokens": tokens}, inputs)
        Path(scratch, "captions.json").write_text(json.dumps(CAPTIONS))
        script = Path(__file__).with_name("reopen_open_clip.py")
        command = [sys.executable, "-P", str(script), str(folder.absolute()), scratch]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise ExportMismatchError(f"a fresh process can't open the export:\n{done.stderr[-4000:]}")
        got = load_file(outputs)
    theirs, cleaned = got.get("tokens"), _encoded(trained, cleaning="clip")
    if theirs is not None and (wrong := _unlike(_ended(theirs), cleaned)):
        raise ExportMismatchError(f"open_clip's tokenizer cuts {wrong[0]!r} otherwise")
    return largest_difference(expected, got), theirs


def _encoded(trained: Trained, **changes: str) -> Tensor:
    """(N, L) tokens of `CAPTIONS`."""
    config = trained.config.data.tokenizer
    assert config is not None, "an image-text objective needs one"
    tokenizer = open_tokenizer(config.model_copy(update=changes))
    return torch.from_numpy(tokenizer.encode_all(CAPTIONS))


def _unlike(tokens: Tensor, others: Tensor) -> list[str]:
    """Those of `CAPTIONS` that two tokenizers cut otherwise."""
    return [CAPTIONS[n] for n in (tokens != others).any(dim=1).nonzero().flatten().tolist()]


def _remarks(trained: Trained, theirs: Tensor | None) -> tuple[str, ...]:
    """What of the tokenizer is otherwise than the run's, or isn't known to be the same."""
    remarks = []
    if theirs is None:
        remarks.append(
            "the tokenizer wasn't compared, and open_clip.get_tokenizer can't open it: transformers isn't "
            "installed here; install keel's extra open-clip, which brings it"
        )
    if unlike := _unlike(_encoded(trained), _encoded(trained, cleaning="clip")):
        remarks.append(
            "open_clip's tokenizer cleans captions (encodings, HTML entities, blanks), and this run took "
            f"them as they were: {unlike[0]!r} and the like get other tokens than in training; a run with "
            "data.tokenizer.cleaning=clip has the same ones"
        )
    return tuple(remarks)


def _ended(tokens: Tensor) -> Tensor:
    """Tokens with everything behind the first highest one, the end, put to 0."""
    end = tokens.argmax(dim=1, keepdim=True)
    return torch.where(torch.arange(tokens.shape[1])[None] <= end, tokens, 0)


def _card(trained: Trained, difference: float, remarks: Sequence[str], licence: str) -> Card:
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
        note="\n\n".join(
            ["`preprocess` prepares images as the run's evaluations did.", *(f"Note: {r}." for r in remarks)]
        ),
        difference=difference,
    )
