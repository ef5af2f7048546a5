"""The contact sheet: samples across, raw and every view below each other, with exactly training's pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import ConfigError
from data_pipeline.config import DataConfig
from data_pipeline.load import build_loader
from data_pipeline.types import CenterCrop, RandomResizedCrop, ViewSpec
from data_pipeline.view import contact_sheet
from tests.data_pipeline.sets import numbered_set, sample, write_set

CELL, GAP, MARGIN = 16, 8, 64


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def cell(sheet: np.ndarray, column: int, row: int, band_top: int = 0) -> np.ndarray:
    left, top = MARGIN + column * (CELL + GAP), band_top + GAP + row * (CELL + GAP)
    return sheet[top : top + CELL, left : left + CELL]


def test_it_shows_what_training_sees(tmp_path: Path) -> None:
    """Of every source, in the order of training."""
    numbered_set(tmp_path / "a", [20])
    write_set(tmp_path / "b", [[sample(500 + n) for n in range(10)]])
    views = [ViewSpec((16, 16), RandomResizedCrop()), ViewSpec((16, 16), CenterCrop(1.0), flip=0)]
    config = DataConfig.model_validate(
        {"manifest": tmp_path / "a", "also": [{"manifest": tmp_path / "b"}], "workers": 0}
    )
    contact_sheet(config, views, tmp_path / "sheet.png", seed=4, position=7, count=5, cell=CELL, across=3)
    sheet = pixels(tmp_path / "sheet.png")
    with build_loader(
        config, views, needs=frozenset({"views"}), seed=4, batch_size=5, rank=0, world_size=1, position=7
    ) as batches:
        batch = next(batches)
    assert sheet.shape[1] == MARGIN + 3 * (CELL + GAP)
    second = sheet.shape[0] // 2 - GAP // 2  # the second band of two alike
    for number, index in enumerate(batch.index.tolist()):
        column, top = number % 3, second * (number // 3)
        for row, view in enumerate(batch.views):
            expected = view[number].permute(1, 2, 0).numpy()
            assert np.abs(cell(sheet, column, row + 1, top) - expected).max() <= 1
        shown = cell(sheet, column, 0, top)[8, 8]
        assert shown[0] + 256 * shown[1] == (index if index < 20 else 500 + index - 20)
    blank = cell(sheet, 2, 0, second)  # five samples leave the sixth place empty
    assert (blank == 255).all()


def test_keys_classes_and_captions_stand_below(tmp_path: Path) -> None:
    """Longer captions take more room; what can't be shown doesn't stop it; a page has a sensible width."""
    heights = []
    for words in (1, 8, 400):
        samples = [{**sample(n), "txt": ("word " * words).encode()} for n in range(3)]
        samples.append({**sample(3), "txt": b"\xff"})
        samples.append({**sample(4), "txt": ("long" * 500).encode()})
        set_ = write_set(tmp_path / str(words), [samples], [str(n) for n in range(10)])
        config = DataConfig(manifest=set_.path, workers=0)
        contact_sheet(
            config, [ViewSpec((16, 16), CenterCrop(1.0))], tmp_path / "s.png", count=3 + 9, cell=144
        )
        sheet = pixels(tmp_path / "s.png")
        heights.append(sheet.shape[0])
        assert sheet.shape[1] == MARGIN + 8 * (144 + GAP) < 1400
        assert (sheet[:, :MARGIN] < 200).any() and (sheet[-60:, MARGIN : MARGIN + 144] < 100).any()
    assert heights[0] == heights[1] == heights[2] < 1000  # the longest caption is cut


def test_a_stream_has_no_sheet() -> None:
    config = DataConfig.model_validate({"stream": {"shards": ["a.tar"], "samples": 4}})
    with pytest.raises(ConfigError, match=r"data.manifest: is missing, and data.stream can't stand in"):
        contact_sheet(config, [], Path("none.png"))
