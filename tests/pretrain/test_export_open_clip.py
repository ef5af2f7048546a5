"""An image-text pair opens in open_clip with the same embeddings, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import RunError
from configs.loading import load
from pretrain import export_open_clip, run
from pretrain.config import RunConfig
from pretrain.encoders import EncoderConfig
from pretrain.folder import RunFolder
from pretrain.health import StopRequest
from tests.conftest import Ranks

pytest.importorskip("open_clip")
RESNET = ("encoder.name=resnet18",)


def train_here(root: str) -> None:
    """Run by a forked rank."""
    run.train(RunFolder(Path(root)), StopRequest())


def trained(ranks: Ranks, root: Path, *overrides: str, smoke: str = "clip") -> Path:
    """Two steps of a smoke config."""
    short = ["train.duration=2 steps", "optimizer.warmup=1 steps", "data.workers=0", f"run.dir={root}"]
    config = load(f"smoke/{smoke}", RunConfig, [*short, *(() if overrides == RESNET else overrides)])
    if overrides == RESNET:  # without arguments, which no override can take away
        config = config.model_copy(update={"encoder": EncoderConfig(name="resnet18", crop=1.0)})
    run.prepare(config, world_size=1)
    ranks(1, train_here, root=str(root))
    return root


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.loss=sigmoid",),
        (
            "encoder.name=vit_base_patch32_clip_224",
            "encoder.args={init_values: 0.1, patch_size: 8, depth: 2}",
        ),
        RESNET,
    ],
)
def test_embeddings_are_the_same(tmp_path: Path, ranks: Ranks, overrides: tuple[str, ...]) -> None:
    root = trained(ranks, tmp_path / "run", *overrides)
    result = export_open_clip.export(root, tmp_path / "out")
    assert result.max_difference < 1e-5
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    with pytest.raises(RunError, match="exists already"):
        export_open_clip.export(root, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: open_clip" in card and "name: clip" in card.split("```yaml")[1]
    export_open_clip.export(root, tmp_path / "out", force=True)


def test_an_objective_without_text_is_a_line(tmp_path: Path, ranks: Ranks) -> None:
    root = trained(ranks, tmp_path / "run", smoke="mae")
    with pytest.raises(RunError, match="no text tower"):
        export_open_clip.export(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
