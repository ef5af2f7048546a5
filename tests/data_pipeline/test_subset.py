"""A subset holds exactly the chosen samples, bytes and labels, as a set of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.demo import DemoConfig, make
from data_pipeline.manifest import Manifest
from data_pipeline.read import IMAGE_FIELDS, LABEL_FIELDS, Reader
from data_pipeline.subset import write_subset


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory = tmp_path_factory.mktemp("digits")
    make(DemoConfig(name="digits"), directory)
    return Manifest.load(directory / "val")


def test_the_chosen_samples_in_the_order_given(whole: Manifest, tmp_path: Path) -> None:
    chosen = [300, 2, 17]
    write_subset(whole, chosen, tmp_path / "few")
    few = Manifest.load(tmp_path / "few")
    assert few.samples == 3
    assert few.classes == whole.classes
    source, copy = Reader(whole), Reader(few)
    wanted = [IMAGE_FIELDS, LABEL_FIELDS]
    assert [copy.read(0, n, wanted) for n in range(3)] == [source.read(0, n, wanted) for n in chosen]
    source.close(), copy.close()
