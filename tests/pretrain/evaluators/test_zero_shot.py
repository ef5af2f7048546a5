"""Zero-shot classification against the same written out by hand, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import ConfigError, DataError
from data_pipeline import demo
from data_pipeline.load import sequential
from data_pipeline.manifest import Manifest
from data_pipeline.tokenize import Tokenizer, TokenizerConfig, train
from data_pipeline.transform import device_half
from data_pipeline.types import CenterCrop, ViewSpec
from pretrain import collectives, encoders
from pretrain.encoders import EncoderConfig
from pretrain.evaluators.zero_shot import ZeroShotConfig
from pretrain.judging.subject import Subject
from pretrain.objective import BuildContext
from pretrain.objectives.clip import CLIP, CLIPConfig

VIEW = ViewSpec(size=(32, 32), crop=CenterCrop(1.0), flip=0.0)
TEMPLATES = ("a photo of a {}.", "there is a red {}", "{}")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    demo.make(demo.DemoConfig(name="shapes", samples=20, val_samples=90), folder)
    return folder


def tokenizer() -> Tokenizer:
    captions = ["a red circle", "a blue star", "there is a photo of a square"] * 3
    return Tokenizer(TokenizerConfig(path=Path("made.json"), context=16), train(captions, 280))


def clip() -> CLIP:
    torch.manual_seed(0)
    size = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = encoders.build(EncoderConfig(name="vit_tiny_patch16_224", args=size), (32, 32))
    text = {"vocabulary": tokenizer().vocabulary, "context": 16, "width": 16, "depth": 1, "heads": 2}
    config = CLIPConfig.model_validate({"width": 8, "text": text})
    return config.build(BuildContext(encoder, (32, 32), 100, 8, None))


def subject(objective: Any, words: Tokenizer | None = None) -> Subject:
    encoder = objective.encoder
    return Subject(
        encoder, encoder, VIEW, torch.device("cpu"), objective, batch_size=7, tokenizer=words or tokenizer()
    )


def judged(shapes: str) -> dict[str, float]:
    return dict(ZeroShotConfig(data=Path(shapes), templates=TEMPLATES).build()(subject(clip())).values)


def test_it_is_the_mean_of_the_prompts(shapes: Path) -> None:
    """Class by class, template by template, image by image."""
    model, words, names = clip().eval(), tokenizer(), Manifest.load(shapes / "val").classes
    with torch.no_grad():
        classes = []
        for name in names:
            tokens = torch.stack([torch.from_numpy(words.encode(t.format(name))) for t in TEMPLATES])
            units = [nn.functional.normalize(model.text(row[None])[0], dim=0) for row in tokens]
            classes.append(nn.functional.normalize(sum(units), dim=0))  # type: ignore[arg-type]
        first = among = count = 0
        for batch in sequential(shapes / "val", VIEW, batch_size=90):
            images = model.image_projection(model.encoder(device_half([VIEW])(batch).views[0]))
            assert batch.target is not None
            for image, label in zip(images, batch.target.tolist(), strict=True):
                order = sorted(range(10), key=lambda c, i=image: -float(i @ classes[c]))
                first, among, count = first + (order[0] == label), among + (label in order[:5]), count + 1
    got = judged(str(shapes))
    assert count == 90 and got == pytest.approx({"top1": 100 * first / 90, "top5": 100 * among / 90})
    assert 0 < got["top1"] < got["top5"] < 100


def on_ranks(shapes: str) -> dict[str, float]:
    from pretrain.engines import processes

    processes.start("cpu")
    assert collectives.ranks() > 1
    found = judged(shapes)
    processes.stop()
    return found


def test_ranks_do_not_matter(ranks: Any, shapes: Path) -> None:
    alone = judged(str(shapes))
    assert ranks(2, on_ranks, shapes=str(shapes)) == [pytest.approx(alone)] * 2


def test_names_and_templates_from_files(shapes: Path, tmp_path: Path) -> None:
    names = Manifest.load(shapes / "val").classes
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "prompts.txt").write_text("\n\n".join(TEMPLATES))
    want = judged(str(shapes))
    for classes in ("names.txt", "names.json"):
        config = ZeroShotConfig(
            data=shapes, classes=tmp_path / classes, templates=tmp_path / "prompts.txt"
        ).placed()
        assert dict(config.build()(subject(clip())).values) == want


def test_other_names_judge_otherwise(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(reversed(Manifest.load(shapes / "val").classes)))
    config = ZeroShotConfig(data=shapes, classes=tmp_path / "names.txt", templates=TEMPLATES)
    assert dict(config.build()(subject(clip())).values) != judged(str(shapes))


def test_what_it_refuses_is_one_line(shapes: Path, tmp_path: Path) -> None:
    config = ZeroShotConfig(data=shapes)
    with pytest.raises(ConfigError, match=r"evaluate\.zero_shot: needs a run whose objective embeds"):
        config.require_possible(nn.Linear(2, 2))
    config.require_possible(clip())
    without = Subject(nn.Identity(), nn.Identity(), VIEW, torch.device("cpu"), clip())
    with pytest.raises(ConfigError, match=r"evaluate\.zero_shot: the run's data\.tokenizer is missing"):
        config.build()(without)
    (tmp_path / "few.txt").write_text("circle\nsquare\n")
    few = ZeroShotConfig(data=shapes, classes=tmp_path / "few.txt")
    with pytest.raises(ConfigError, match=r"zero_shot\.classes: .*few.txt names 2 classes, .* has \d+; give"):
        few.require_data()
    nameless = Manifest.load(shutil.copytree(shapes / "val", tmp_path / "nameless"))
    dataclasses.replace(nameless, classes=()).save()
    few = few.model_copy(update={"data": tmp_path / "nameless"})
    with pytest.raises(DataError, match=r"has label [2-9], but only 2 classes are named"):
        few.build()(subject(clip()))
    with pytest.raises(ConfigError, match=r"evaluate\.zero_shot\.classes: .*gone: can't be read"):
        ZeroShotConfig(data=shapes, classes=tmp_path / "gone").build()(subject(clip()))
    with pytest.raises(ValueError, match=r"each template has one \{\}"):
        ZeroShotConfig(data=shapes, templates=("a photo",))
