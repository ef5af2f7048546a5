"""Architectures that don't ship with timm: their modules are imported where the encoder is made, and where
it is opened.

A module that calls timm's `register_model` adds to timm's list when it is imported. A run that only happens
to have imported it could train, but nobody could open what it exports.
"""

from __future__ import annotations

import difflib
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from pretrain.encoders.torchvision_compat import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def bring(modules: Iterable[str]) -> None:
    """Import `modules`. Raises ValueError naming the one that can't be."""
    for name in modules:
        if not _DOTTED.fullmatch(name):
            raise ValueError(f"found {name!r}; say a module's dotted name, such as mylab.nets")
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module itself raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(
                f"{name} can't be imported ({reason}); install it, or put its folder on PYTHONPATH"
            ) from error


def require_known(name: str) -> None:
    """Raises ValueError where no architecture has the name, with those that are near."""
    if timm.is_model(name):
        return
    if ":" in name:
        raise ValueError(
            "an architecture, not a place of weights: set encoder.name to what config.json calls "
            "architecture, and "
            "encoder.weights to the folder or name"
        )
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    raise ValueError(
        "not an architecture of the installed timm " + timm.__version__
        + (f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models()")
        + "; one of your own is registered by a module that encoder.imports names"
    )  # fmt: skip


def origins(name: str, imports: Iterable[str] = ()) -> list[str]:
    """Modules to be imported before timm can make `name`: none for timm's own.

    `imports` first, and where none of them is, or holds, the one that defines it, that one too.
    """
    home = timm.model_entrypoint(name.partition(".")[0]).__module__
    if home == "timm" or home.startswith("timm."):
        return list(imports)
    named = list(imports)
    return named if named else [home]


def problem(name: str, imports: Iterable[str] = ()) -> str | None:
    """Why a fresh process couldn't make `name`; None where it can. Starts one, unless it is timm's own."""
    home = timm.model_entrypoint(name.partition(".")[0]).__module__
    if home == "timm" or home.startswith("timm."):
        return None
    needed = origins(name, imports)
    if "__main__" in needed:
        return "is registered by the program itself; put it into a module of its own and name that in "
        "encoder.imports"
    code = (
        "import sys, importlib\nname, *modules = sys.argv[1:]\nfor module in modules: "
        "importlib.import_module(module)\n"
        "import timm\nsys.exit(0 if timm.is_model(name) else f'importing {modules} registers no {name}')"
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, name, *needed],
            cwd=elsewhere, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode == 0:
        return None
    reason = (done.stderr.strip().splitlines() or ["it died"])[-1][:200]
    return (
        f"a fresh process, as whoever opens the export has, can't make it by importing {', '.join(needed)}: "
        f"{reason}; "
        "install the module, or put its folder on PYTHONPATH, and name it in encoder.imports"
    )


def opened_with(config: Any) -> list[str]:
    """The modules that an export's config.json says it needs; none where it isn't keel's."""
    keel = config.get("keel") if isinstance(config, dict) else None
    found = keel.get("imports") if isinstance(keel, dict) else None
    return [str(name) for name in found] if isinstance(found, list) else []
