"""An image-text pair opens in open_clip with the same embeddings, or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch

from configs.errors import RunError
from configs.loading import load
from data_pipeline.tokenize import TokenizerConfig
from pretrain import encoders
from pretrain.config import RunConfig
from pretrain.encoders import EncoderConfig
from pretrain.export import open_clip_folder
from pretrain.export.timm_folder import ExportMismatchError
from pretrain.health.stopping import StopRequest
from pretrain.objective import BuildContext
from pretrain.run import main
from pretrain.run.folder import RunFolder
from tests.conftest import Ranks

RESNET = ("encoder.name=resnet18",)


def train_here(root: str) -> None:
    """Run by a forked rank."""
    main.train(RunFolder(Path(root)), StopRequest())


def trained(ranks: Ranks, root: Path, *overrides: str, smoke: str = "clip") -> Path:
    """Two steps of a smoke config."""
    short = ["train.duration=2 steps", "optimizer.warmup=1 steps", "data.workers=0", f"run.dir={root}"]
    config = load(f"smoke/{smoke}", RunConfig, [*short, *(() if overrides == RESNET else overrides)])
    if overrides == RESNET:  # without arguments, which no override can take away
        config = config.model_copy(update={"encoder": EncoderConfig(name="resnet18", crop=1.0)})
    main.prepare(config, world_size=1)
    ranks(1, train_here, root=str(root))
    return root


QUICK = ("data.tokenizer.cleaning=clip", "objective.text.activation=quick_gelu")


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.loss=sigmoid", *QUICK, "encoder.args.act_layer=quick_gelu"),
        (
            "encoder.name=vit_base_patch32_clip_224",
            "encoder.args={init_values: 0.1, patch_size: 8, depth: 2}",
        ),
        RESNET,
    ],
)
def test_embeddings_are_the_same(tmp_path: Path, ranks: Ranks, overrides: tuple[str, ...]) -> None:
    root = trained(ranks, tmp_path / "run", *overrides)
    result = open_clip_folder.export(root, tmp_path / "out")
    assert result.max_difference < 1e-5
    compared = importlib.util.find_spec("transformers") is not None
    assert any("wasn't compared" in remark for remark in result.remarks) != compared
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    with pytest.raises(RunError, match="exists already"):
        open_clip_folder.export(root, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: open_clip" in card and "name: clip" in card.split("```yaml")[1]
    open_clip_folder.export(root, tmp_path / "out", force=True)


TRANSFORMERS = """
import json, pathlib, types, tokenizers, torch

class AutoTokenizer:
    @staticmethod
    def from_pretrained(folder, cache_dir=None):
        folder = pathlib.Path(folder)
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        library.encode_special_tokens = config["split_special_tokens"]
        pad = config["pad_token"]

        def call(texts, return_tensors, max_length, padding, truncation):
            library.enable_truncation(max_length)
            library.enable_padding(length=max_length, pad_token=pad, pad_id=library.token_to_id(pad))
            rows = [encoding.ids for encoding in library.encode_batch(texts)]
            return types.SimpleNamespace(input_ids=torch.tensor(rows))

        return call
"""
"""What open_clip asks of transformers, so that the comparison runs where that isn't installed."""


@pytest.fixture
def with_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For fresh processes."""
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "transformers.py").write_text(TRANSFORMERS)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stand-in'}{os.pathsep}{before}")


@pytest.mark.usefixtures("with_transformers")
def test_unclean_captions_are_compared_and_what_differs_is_said(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trained(ranks, tmp_path / "run")
    result = open_clip_folder.export(root, tmp_path / "out")
    assert len(result.remarks) == 1, "the comparison was made"
    assert "a red circle &amp;amp; more' and the like get other tokens than in training" in result.remarks[0]
    assert "data.tokenizer.cleaning=clip" in result.remarks[0]
    assert result.remarks[0] in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(open_clip_folder, "_encoded", lambda trained, **_: torch.ones(12, 24).long())
    with pytest.raises(ExportMismatchError, match="tokenizer cuts 'a small red star"):
        open_clip_folder.export(root, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_comparison_that_was_not_made_is_said(tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(path="openai", context=24)
    run = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(tokenizer=tokenizer)))
    assert open_clip_folder._remarks(run, torch.zeros(1)) == ()  # type: ignore[arg-type]
    (said,) = open_clip_folder._remarks(run, None)  # type: ignore[arg-type]
    assert "wasn't compared" in said and "transformers isn't installed" in said and "extra open-clip" in said


def test_towers_of_two_activations_are_a_line(tmp_path: Path, ranks: Ranks) -> None:
    root = trained(ranks, tmp_path / "run", "objective.text.activation=quick_gelu")
    with pytest.raises(RunError, match="its activation is gelu, the text tower's quick_gelu, and open_clip"):
        open_clip_folder.export(root, tmp_path / "out")


def test_siglips_tower_goes_over_as_timms() -> None:
    """Names and shapes: nothing is computed."""
    config = load("clip/siglip_vitb16", RunConfig)
    with torch.device("meta"):
        encoder = encoders.build(config.encoder, (224, 224))
        pair = config.objective.build(BuildContext(encoder, (224, 224), 10**6, 32, None))
        coloured = SimpleNamespace(grey=False)
        run = SimpleNamespace(config=config, image_size=(224, 224), view=coloured)
        weights, model = open_clip_folder._image_tower(pair, run)  # type: ignore[arg-type]
        text = open_clip_folder._text_config(pair)  # type: ignore[arg-type]
        model.pop("custom_text")
        theirs = open_clip.CLIP(**model, text_cfg=text).visual.state_dict()
    assert {f"visual.{n}": v.shape for n, v in theirs.items()} == {n: v.shape for n, v in weights.items()}
    assert model["vision_cfg"]["timm_pool"] == "map" and model["vision_cfg"]["timm_proj"] == "none"
    small = SimpleNamespace(config=config, image_size=(64, 64), view=coloured)
    with pytest.raises(RunError, match=r"data\.image_size: found \(64, 64\); open_clip makes timm's"):
        open_clip_folder._image_tower(pair, small)  # type: ignore[arg-type]


def test_an_objective_without_text_is_a_line(tmp_path: Path, ranks: Ranks) -> None:
    root = trained(ranks, tmp_path / "run", smoke="mae")
    with pytest.raises(RunError, match="no text tower"):
        open_clip_folder.export(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
