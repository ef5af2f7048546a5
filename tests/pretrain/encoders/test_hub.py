"""What timm is asked to open has the names that keel prints; a hub out of reach is told within seconds."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from configs.errors import RunError
from pretrain.encoders import EncoderConfig, hub
from pretrain.export.open import open_timm


def export(folder: Path, file: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    (folder / file).write_text("{}")
    return folder


def test_a_folder_is_named_with_and_without_what_timm_puts_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(tmp_path / "größe %d='x' 猫")
    monkeypatch.chdir(tmp_path)
    wanted = f"local-dir:{folder}"
    for source in (str(folder), f"local-dir:{folder}", f"local-dir:{folder.name}", folder.name):
        assert hub.timm_name(source) == wanted
        assert hub.config_file(source) is not None
    assert hub.timm_name("hf-hub:owner/name") == "hf-hub:owner/name"
    assert hub.timm_name("resnet18.a1_in1k") == "resnet18.a1_in1k"
    config = EncoderConfig(name="resnet18", weights=f"local-dir:{folder.name}")
    assert config.placed().weights == wanted
    hub_config = EncoderConfig(name="resnet18", weights="hf-hub:owner/name")
    assert hub_config.placed().weights == "hf-hub:owner/name"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("vit_bse_patch16_224", "did you mean vit_base_patch16_224"),
        ("resnet18.a1_in1", "resnet18.a1_in1: timm has no such weights; did you mean resnet18.a1_in1k"),
        ("local-dir:nowhere", "there is no folder nowhere"),
        ("nothing-like-it", "neither a run folder, an exported folder, nor a model that timm knows"),
    ],
)
def test_what_does_not_exist_is_a_line_with_what_may_have_been_meant(source: str, said: str) -> None:
    for call in (lambda: open_timm(source), lambda: hub.timm_name(source)):
        with pytest.raises(RunError, match=said) as told:
            call()
        assert len(str(told.value).splitlines()) == 1


def test_an_export_for_open_clip_is_refused_by_name(tmp_path: Path) -> None:
    folder = export(tmp_path / "pair", "open_clip_config.json")
    with pytest.raises(RunError, match=r"pair: is an export for open_clip.*--format timm"):
        open_timm(str(folder))
    with pytest.raises(RunError, match=r"neither a run folder nor one that timm opens"):
        open_timm(str(export(tmp_path / "other", "thesis.txt")))


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own client would try for a minute."""

    def unreachable(*arguments: Any, **options: Any) -> socket.socket:
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    for name in ("resnet18.a1_in1k", "hf-hub:owner/name"):
        said = f"{name}: timm can't open it: it isn't in the hub's cache here, and .* can't be reached"
        with pytest.raises(RunError, match=said):
            open_timm(name)
    assert time.monotonic() - began < 20
    assert constants.HF_HUB_OFFLINE is False
