"""Architectures with objectives: each pair works or is refused in a line, and what works goes the whole way.

The pairs that are refused are in refusals.json; one more fails here. docs/backbones.md is the whole table.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import backbones
from benchmarks.backbones import ARCHITECTURES, OBJECTIVES, SPREAD, Architecture
from pretrain.export import timm_folder
from pretrain.export.check import TOLERANCE

REFUSED: dict[str, list[str]] = json.loads(Path(__file__).with_name("refusals.json").read_text())
"""Objective to the architectures that it refuses."""
NAMES = [a.name for a in ARCHITECTURES]
PLAIN = [a.name for a in ARCHITECTURES if a.kind.startswith(("ViT", "DeiT", "DINOv2", "register"))]


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are opened here at once; a fresh process opens all of them together."""
    monkeypatch.setattr(timm_folder, "_reopened", timm_folder._reopened)
    backbones.in_this_process()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=NAMES)
def test_each_pair_works_or_is_refused_in_a_line(architecture: Architecture) -> None:
    for objective in OBJECTIVES:
        refused = backbones.decide(architecture, objective)
        wanted = architecture.name in REFUSED[objective]
        assert bool(refused) == wanted, refused or "works now: take it off the list"
        assert not refused or ("\n" not in refused and refused.startswith(("encoder.", "objective."))), (
            refused
        )


def test_what_is_required_works() -> None:
    assert len(ARCHITECTURES) >= 60 and set(REFUSED) == set(OBJECTIVES)
    for objective in ("moco", "moco_v3", "clip", "siglip"):
        assert len(NAMES) - len(REFUSED[objective]) >= 55
    assert not set(REFUSED["mae"]) & set(PLAIN)
    assert set(SPREAD) <= set(NAMES)


def cells() -> list[tuple[Architecture, str]]:
    """One objective an architecture, and all of them with four that differ most."""
    found = {(a.name, backbones.rotated(a)): a for a in ARCHITECTURES if not a.large}
    for a in ARCHITECTURES:
        if a.name in SPREAD:
            found |= {(a.name, o): a for o in OBJECTIVES if a.name not in REFUSED[o]}
    return [(a, objective) for (_, objective), a in found.items()]


def go(chosen: list[tuple[Architecture, str]], folder: Path) -> None:
    done = {}
    for architecture, objective in chosen:
        done[folder / f"{architecture.name}-{objective}"] = row = backbones.run_cell(
            architecture, objective, folder / f"{architecture.name}-{objective}"
        )
        assert row.get("whole") and "failed" not in row, row
    found = backbones.reopen_all(list(done))
    for path in done:
        shutil.rmtree(path)  # gigabytes together
    assert found.keys() == done.keys()
    wrong = {path.name: difference for path, difference in found.items() if not difference < TOLERANCE}
    assert not wrong


@pytest.mark.timeout(900)
def test_the_whole_way_with_one_objective_each(tmp_path: Path) -> None:
    go(cells(), tmp_path)


@pytest.mark.torture
def test_the_whole_way_of_every_pair(tmp_path: Path) -> None:
    for architecture in ARCHITECTURES:
        go([(architecture, o) for o in OBJECTIVES if architecture.name not in REFUSED[o]], tmp_path)
