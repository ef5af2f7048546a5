"""docs/architecture.md shows the house as it stands, and no room lies open that isn't meant to."""

from __future__ import annotations

import pytest

from tests.architecture import house

OPEN = {
    "pretrain": {
        "api", "config", "trainer", "accumulation", "checkpoint", "collectives", "optimizers", "schedules",
        "clock", "objective", "ports", "finetune",
    },
    "launch": {"__main__", "doctor", "progress"},
}  # fmt: skip
"""Modules that lie directly in a package, each known by its name."""


def test_the_page_is_current() -> None:
    assert house.PAGE.read_text() == house.page(), "python tests/architecture/house.py writes it anew"


@pytest.mark.parametrize("package", sorted(OPEN))
def test_only_these_rooms_lie_open(package: str) -> None:
    there = {path.stem for path in (house.ROOT / package).glob("*.py")} - {"__init__"}
    assert there == OPEN[package]


def test_every_folder_says_what_belongs_there() -> None:
    for package in OPEN:
        for folder in (house.ROOT / package).iterdir():
            if (folder / "__init__.py").is_file():
                assert len(house.rooms(package)[folder.name]) > 40, folder


def test_a_circle_is_seen() -> None:
    with pytest.raises(ValueError, match="a circle: a -> b -> a"):
        house.levels({"a": {"b"}, "b": {"a"}})
    assert house.levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [["a"], ["b"], ["c"]]
    assert house.needed({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [("a", "b"), ("b", "c")]
