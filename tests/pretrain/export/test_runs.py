"""Exports of real runs, reopened in one fresh process: every objective, ZeRO stage and number of ranks."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import RunError
from configs.loading import load
from data_pipeline import demo
from data_pipeline.transform import center_view
from data_pipeline.types import CenterCrop
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.encoders import EncoderConfig
from pretrain.export import timm_folder
from pretrain.export.open import open_timm
from pretrain.judging.schedule import write as record
from pretrain.objective import Weights
from pretrain.ports import Scores
from pretrain.run import trained
from pretrain.run.main import prepare
from tests.places import FullDisk
from tests.pretrain.last_look import train_and_look

timm = pytest.importorskip("timm")

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 8}
VIT, RESNET = "vit_tiny_patch16_224", "resnet18"


@dataclass(frozen=True)
class Case:
    """One run: the smoke config of its name, cut short."""

    ranks: int
    stage: int
    encoder: EncoderConfig
    overrides: tuple[str, ...] = ()
    weights: tuple[Weights, ...] = ("model",)


CASES = {
    "mae": Case(
        4, 3, EncoderConfig(name="vit_small_patch16_224", pooling="avg", crop=1.0,
                            args={"num_heads": 12, "depth": 1, "patch_size": 8}),
    ),
    "moco": Case(
        2, 0, EncoderConfig(name=RESNET, args={"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}),
        ("objective.momentum=0.5",), ("model", "teacher", "ema"),
    ),
    "moco_v3": Case(
        4, 1, EncoderConfig(name=VIT, args=TINY | {"global_pool": "avg"}),
        ("objective.momentum=0.5",), ("model", "teacher"),
    ),
    "clip": Case(2, 2, EncoderConfig(name=VIT, args=TINY, crop=0.9)),
    "siglip": Case(
        1, 3, EncoderConfig(name=RESNET, args={"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}),
        ("objective.mean=[0.5, 0.5, 0.5]", "objective.std=[0.5, 0.5, 0.5]"),
    ),
}  # fmt: skip

OPEN_ALL = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
(folder,) = sys.argv[1:]
import timm
found = {}
for name in json.load(open(folder + "/names.json")):
    model = timm.create_model(f"local-dir:{folder}/{name}", pretrained=True).eval()
    with torch.no_grad():
        found[name] = model(load_file(folder + "/images.safetensors")["images"]).contiguous()
assert not {"pretrain", "data_pipeline", "configs"} & set(sys.modules)
save_file(found, folder + "/features.safetensors")
"""


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def train_and_tell(root: str) -> dict[str, Tensor]:
    """Train on this rank; gives what the encoders, while still in training's hands, compute for `images`."""

    def look(objective: nn.Module) -> dict[str, Tensor]:
        objective.eval()
        with torch.no_grad():
            return {
                name: encoders.features(part, images()).clone()
                for name, part in objective.named_children()
                if name in ("encoder", "teacher_encoder")
            }

    return train_and_look(root, look)


@dataclass
class Exports:
    """Five runs and what was exported of them."""

    root: Path
    trained: dict[str, Tensor] = field(default_factory=dict)  # "moco teacher": as training computed them
    reopened: dict[str, Tensor] = field(default_factory=dict)  # the same, from the folders in a fresh process

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def folder(self, name: str, weights: str = "model") -> Path:
        return self.root / "exports" / f"{name} {weights}"


def reopened_here(folder: Path, images: Tensor, form: timm_folder.Format = "timm") -> dict[str, Tensor]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        return {"features": model(images), "tokens": model.forward_features(images)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Exports]:
    found = Exports(tmp_path_factory.mktemp("exports"))
    ranks: Callable[..., list[Any]] = request.getfixturevalue("_fork_server").run
    digits, names = found.root / "digits", []
    demo.make(demo.DemoConfig(name="digits"), digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_folder, "_reopened", reopened_here)  # one fresh process for all of them, below
        for name, case in CASES.items():
            root = found.run(name)
            short = [
                "train.duration=2 steps",
                "optimizer.warmup=1 steps",
                "data.workers=0",
                f"run.dir={root}",
            ]
            own = [] if name in ("clip", "siglip") else [f"data.manifest={digits}/train/manifest.json"]
            config = load(
                f"smoke/{name}", RunConfig, [*short, *own, f"train.zero_stage={case.stage}", *case.overrides]
            )
            prepare(config.model_copy(update={"encoder": case.encoder}), world_size=case.ranks)
            told = ranks(case.ranks, train_and_tell, root=str(root))[0]
            for weights in case.weights:
                timm_folder.export(root, found.folder(name, weights), weights=weights)
                names.append(f"{name} {weights}")
                found.trained[names[-1]] = told["encoder" if weights == "model" else "teacher_encoder"]
    place = found.root / "exports"
    (place / "names.json").write_text(json.dumps(names))
    save_file({"images": images()}, place / "images.safetensors")
    command = [sys.executable, "-P", "-c", OPEN_ALL, str(place)]
    subprocess.run(command, check=True, cwd=place, timeout=120)
    found.reopened = load_file(place / "features.safetensors")
    yield found


def test_the_cases_cover_every_stage_and_number_of_ranks() -> None:
    assert {case.stage for case in CASES.values()} == {0, 1, 2, 3}
    assert {case.ranks for case in CASES.values()} == {1, 2, 4}
    packaged = Path(trained.__file__).parents[2] / "configs/smoke"
    assert {path.stem for path in packaged.glob("*.yaml")} == set(CASES), "an objective has no case"


@pytest.mark.parametrize(
    "name", [f"{name} {which}" for name, case in CASES.items() for which in case.weights]
)
def test_a_fresh_process_computes_what_training_did(exports: Exports, name: str) -> None:
    assert exports.reopened[name].std() > 0
    torch.testing.assert_close(exports.reopened[name], exports.trained[name], rtol=0, atol=1e-5)


def test_the_teacher_is_the_running_average_and_not_the_model(exports: Exports) -> None:
    for name in ("moco", "moco_v3"):
        student, teacher = exports.reopened[f"{name} model"], exports.reopened[f"{name} teacher"]
        assert not torch.allclose(student, teacher, atol=1e-3)
    assert torch.equal(exports.reopened["moco ema"], exports.reopened["moco teacher"])
    told = json.loads((exports.folder("moco", "teacher") / "config.json").read_text())["keel"]
    assert told["weights"] == "teacher"


@pytest.mark.parametrize("weights", ["ema", "teacher"])
def test_weights_that_a_run_does_not_keep_are_a_line(
    exports: Exports, tmp_path: Path, weights: Weights
) -> None:
    with pytest.raises(
        RunError, match=rf"mae: has no {weights} weights: mae keeps .*; allowed: --weights model$"
    ):
        timm_folder.export(exports.run("mae"), tmp_path / "out", weights=weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_timms_transform_shows_it_images_as_the_runs_evaluations_do(exports: Exports, name: str) -> None:
    """Within two grey levels of 255: the resampling rounds otherwise."""
    view = trained.read(exports.run(name)).view
    assert isinstance(view.crop, CenterCrop)
    model, found = open_timm(str(exports.folder(name)))
    assert found == view, "keel evaluate EXPORT must see what keel evaluate RUN does"
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    coarse = np.random.default_rng(0).integers(0, 255, (20, 28, 3), dtype=np.uint8)
    for size in ((350, 260), (47, 61)):
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        own = center_view(np.array(picture), view, view.crop.fraction)[0]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (view.mean, view.std))
        difference = (transform(picture) * std + mean) * 255 - own
        assert difference.abs().max() <= 2.01, size


def test_preprocessing_is_the_runs_own(exports: Exports) -> None:
    wants = {
        name: timm.data.resolve_model_data_config(
            timm.create_model(f"local-dir:{exports.folder(name)}", pretrained=True)
        )
        for name in ("clip", "siglip")
    }
    assert wants["clip"]["mean"] == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert wants["clip"]["std"] == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert wants["clip"]["crop_pct"] == 0.9
    assert tuple(wants["siglip"]["mean"]) == tuple(wants["siglip"]["std"]) == (0.5, 0.5, 0.5)


def test_twelve_heads_stay_twelve(exports: Exports) -> None:
    model = timm.create_model(f"local-dir:{exports.folder('mae')}", pretrained=True)
    assert (model.embed_dim, model.blocks[0].attn.num_heads) == (384, 12)


def plain(name: str, folder: Path, args: dict[str, Any], **pooling: Any) -> Tensor:
    """Features of timm's architecture with the exported file alone, as who has no config.json loads it."""
    weights = str(folder / "model.safetensors")
    model = timm.create_model(
        name, num_classes=0, img_size=32, checkpoint_path=weights, **args, **pooling
    ).eval()
    with torch.no_grad():
        return model(images())


def test_mean_pooling_behind_a_norm_has_timms_names(exports: Exports) -> None:
    """`encoder.args.global_pool: avg`: the run has timm's fc_norm, and so has its export."""
    folder = exports.folder("moco_v3")
    names = load_file(folder / "model.safetensors").keys()
    assert "fc_norm.weight" in names and "norm.weight" not in names
    torch.testing.assert_close(plain(VIT, folder, TINY, global_pool="avg"), exports.trained["moco_v3 model"])


def test_mean_pooling_of_normed_tokens_cannot_be_misread(exports: Exports) -> None:
    """`encoder.pooling: avg`: a norm renamed to fc_norm would open and compute something else."""
    folder, args = exports.folder("mae"), {"num_heads": 12, "depth": 1, "patch_size": 8}
    expected, name = exports.trained["mae model"], "vit_small_patch16_224"
    with pytest.raises(RuntimeError, match="fc_norm"):
        plain(name, folder, args, global_pool="avg")
    torch.testing.assert_close(plain(name, folder, args, global_pool="avg", fc_norm=False), expected)

    moved = {key.replace("norm.", "fc_norm.") if key[:5] == "norm." else key: value
             for key, value in load_file(folder / "model.safetensors").items()}  # fmt: skip
    other = exports.root / "renamed"
    other.mkdir()
    save_file(moved, other / "model.safetensors")
    assert (plain(name, other, args, global_pool="avg") - expected).abs().max() > 1e-2


def test_a_hub_would_hand_out_the_same(exports: Exports, tmp_path: Path) -> None:
    result = timm_folder.export(exports.run("clip"), tmp_path / "out", form="hf", licence="apache-2.0")
    assert result.max_difference < 1e-5
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license) == ("timm", "apache-2.0")
    assert "transformers" in card.data.tags
    assert 'timm.create_model("hf-hub:OWNER/NAME", pretrained=True)' in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_tells_what_the_weights_are(exports: Exports, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exports.run("mae"), run)
    record(run / "evaluations.jsonl", Progress(2, 64, 2, 1438), Scores("knn", {"top1": 51.25}))
    record(run / "evaluations.jsonl", Progress(1, 32, 2, 1438), Scores("knn", {"top1": 12.5}))
    model = trained.read(run)
    backbone = timm_folder.Backbone(
        model.encoder, model.config.encoder, model.view,
        timm_folder.Story(model.facts(), model.recipe(), model.losses()),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_folder, "_reopened", reopened_here)
        timm_folder.write(backbone, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    state = json.loads((run / "run.json").read_text())
    assert f"| data hash | {state['manifest_hash']} |" in card
    assert f"| commit | {state['commit']} |" in card
    assert "| samples | 64 |" in card
    assert "| knn | top1 | 51.25 |" in card and "12.5" not in card
    assert "![Loss over samples seen](loss.png)" in card
    with Image.open(tmp_path / "out" / "loss.png") as curve:
        assert curve.size == (720, 300)
    assert [samples for samples, _ in model.losses()] == [32, 64]
    started = model.config.encoder.model_copy(update={"weights": "/data/weights/mae.pth"})
    again = replace(model, config=model.config.model_copy(update={"encoder": started}))
    assert again.recipe()["encoder"]["weights"] == "mae.pth"
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["objective"] == model.config.objective.model_dump(mode="json")
    assert EncoderConfig(**recipe["encoder"]) == model.config.encoder
    assert str(tmp_path) not in card and str(exports.root) not in card, "a path of this machine"


def test_a_cards_three_lines_load_it(exports: Exports) -> None:
    folder = exports.folder("moco_v3")
    card = (folder / "README.md").read_text()
    lines = card.split("```python\n")[1].split("\n```")[0]
    assert lines.count("\n") == 2
    names: dict[str, Any] = {"images": images()}
    exec(lines.replace("path/to/this/folder", str(folder)), names)
    torch.testing.assert_close(names["features"], exports.trained["moco_v3 model"])


def test_a_teachers_card_shows_no_figures_of_the_model(exports: Exports, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exports.run("moco"), run)
    record(run / "evaluations.jsonl", Progress(2, 64, 2, 1438), Scores("knn", {"top1": 51.25}))
    assert trained.read(run).facts()["evaluations"] == {"knn": {"top1": 51.25}}
    assert trained.read(run, weights="teacher").facts()["evaluations"] == {}


def test_an_unknown_step_writes_nothing(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint at step 7; there are: 2"):
        timm_folder.export(exports.run("clip"), tmp_path / "out", step=7)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_line(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        RunError, match=r"file/out: can't be written: .*file is a file; .*choose another folder"
    ):
        timm_folder.export(exports.run("clip"), tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_disk_that_takes_no_more_leaves_nothing(exports: Exports, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"out: can't be written: .*File too large.*make room"):
            timm_folder.export(exports.run("clip"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("older", [False, True], ids=["a new folder", "over an older export"])
def test_whatever_call_finds_the_disk_full_an_export_is_whole_or_not_there(
    exports: Exports, tmp_path: Path, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm_folder, "verify", lambda *_: 0.0)  # the fresh process writes nothing
    run = exports.run("clip")

    def begin(root: Path) -> dict[str, bytes]:
        if older:
            timm_folder.export(run, root / "out")
            (root / "out" / "README.md").write_text("the older one")
        return {path.name: path.read_bytes() for path in root.glob("out/*")}

    begin(tmp_path / "whole")
    with FullDisk(tmp_path / "whole") as disk:
        timm_folder.export(run, tmp_path / "whole" / "out", force=older)
    assert disk.calls > 5
    for at in range(disk.calls):
        root = tmp_path / str(at)
        before = begin(root)
        with (
            FullDisk(root, at) as full,
            pytest.raises(RunError, match="can't be written: No space left") as line,
        ):
            timm_folder.export(run, root / "out", force=older)
        assert str(root) in str(line.value), full.log[at]
        out = root / "out"
        if not out.exists() and older:  # not even the way back was open
            [out] = root.glob(".out.*.older")
            assert str(out) in str(line.value)
            out.rename(root / "out")
        assert {path.name: path.read_bytes() for path in root.glob("out/*")} == before, full.log[at]
        assert not list(root.glob(".out*")), full.log[at]
