"""The one module that plug-ins import."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from pretrain import api

PAGE = Path(__file__).resolve().parents[2] / "docs/add_an_objective.md"


def test_what_it_offers_is_what_it_says() -> None:
    there = {name for name in vars(api) if not name.startswith("_")} - {"annotations"}
    assert sorted(api.__all__) == api.__all__ == sorted(there)


@pytest.mark.parametrize("name", api.__all__)
def test_everything_says_what_it_is(name: str) -> None:
    offered = getattr(api, name)
    if isinstance(offered, ModuleType) or (callable(offered) and not isinstance(offered, type(tuple[int]))):
        assert (offered.__doc__ or "").strip(), name


def test_the_page_needs_nothing_else_of_keel() -> None:
    rooms = re.findall(
        r"^from (pretrain|data_pipeline|configs|launch)(\S*) import", PAGE.read_text(), re.MULTILINE
    )
    assert rooms == [("pretrain", ".api")]
