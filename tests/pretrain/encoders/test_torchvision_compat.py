"""torchvision can be imported by every process of the environment, whoever starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import RunError
from pretrain.encoders import torchvision_compat
from pretrain.export import timm_folder

COPY = Path(str(torchvision_compat.__file__))

# A torch and a torchvision like those of a CPU machine, without the weight of the real ones.
TORCH = """
import pathlib
class Library:
    def __init__(self, name, kind): self.name = name
    def define(self, schema): declared.add(self.name + "::" + schema.split("(")[0])
class library: Library = Library
class ops:
    def load_library(path):
        if pathlib.Path(path).read_text() != "fits": raise OSError("libc10_cuda.so: cannot open")
        declared.add("torchvision::nms")
ops.load_library = staticmethod(ops.load_library)
declared = set()
"""
TORCHVISION = """
import torch
if "torchvision::nms" not in torch.declared:
    raise RuntimeError("operator torchvision::nms does not exist")
"""


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with an empty environment; with `paths`, by an interpreter that has these only."""
    place = {"PYTHONPATH": os.pathsep.join(map(str, paths))} if paths else {}
    command = [sys.executable, *(["-S"] if paths else []), "-c", code]
    return subprocess.run(command, cwd="/", env=place, capture_output=True, text=True, check=False)


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A folder of packages with a torchvision whose library doesn't fit."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "_C.so").write_text("for another torch")
    (tmp_path / "torchvision" / "__init__.py").write_text(TORCHVISION)
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / f"{torchvision_compat.HOOK}.py").write_text(COPY.read_text())
    return tmp_path


HOOKED = f"import {torchvision_compat.HOOK} as hook; hook.install(); "


def test_every_process_of_this_environment_imports_what_opens_an_export() -> None:
    """As a user would, with an empty environment and outside of the checkout."""
    done = python("import timm, torchvision, open_clip, sys; print('pretrain' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_an_interpreter_that_doesnt_need_torchvision_loads_nothing_for_it(environment: Path) -> None:
    start = "import __future__, sys; before = set(sys.modules); "
    done = python(f"{start}{HOOKED}print(sorted(set(sys.modules) - before))", environment)
    assert done.stdout == f"['{torchvision_compat.HOOK}']\n", done.stderr
    look = "import importlib.util as u, sys; print(u.find_spec('torchvision').name, 'torch' in sys.modules)"
    assert python(HOOKED + look, environment).stdout == "torchvision False\n"


def test_the_hook_declares_what_the_library_would_have(environment: Path) -> None:
    assert "torchvision::nms does not exist" in python("import torchvision", environment).stderr
    done = python(f"{HOOKED}import torchvision, torch; print(sorted(torch.declared))", environment)
    assert done.stdout == "['torchvision::nms', 'torchvision::qnms']\n", done.stderr


def test_it_does_nothing_beside_a_build_that_fits(environment: Path) -> None:
    (environment / "torchvision" / "_C.so").write_text("fits")
    done = python(f"{HOOKED}import torchvision, torch; print(sorted(torch.declared))", environment)
    assert done.stdout == "['torchvision::nms']\n", done.stderr


def test_what_setup_runs_writes_the_hook_where_it_is_needed_only(environment: Path) -> None:
    site = environment / "site"
    site.mkdir()
    patch = f"import sysconfig; sysconfig.get_paths = lambda: {{'purelib': {str(site)!r}}}; "
    run = f"{patch}import runpy; runpy.run_path({str(COPY)!r}, run_name='__main__')"
    # What checks the result is a process of the real environment, so here it may only be asked to.
    run = f"import subprocess; subprocess.run = lambda *a, **k: subprocess.CompletedProcess(a, 0); {run}"
    done = python(run, environment)
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in site.iterdir()) == ["keel_torchvision.pth", "keel_torchvision.py"]
    assert (
        site / "keel_torchvision.pth"
    ).read_text() == "import keel_torchvision; keel_torchvision.install()\n"
    assert (site / "keel_torchvision.py").read_text() == COPY.read_text()
    (environment / "torchvision" / "_C.so").write_text("fits")
    assert python(run, environment).returncode == 0
    assert not list(site.iterdir()), "a build that fits needs no hook, and an old one is taken away"


def test_an_export_that_nobody_here_could_open_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torchvision_compat, "installed", lambda: False)
    monkeypatch.setattr(torchvision_compat, "compiled_part_loads", lambda package: False)
    with pytest.raises(
        RunError, match=r"fails in a fresh process.*install the build that goes with this one"
    ):
        timm_folder.export(tmp_path / "run", tmp_path / "export")
    assert not list(tmp_path.iterdir())
