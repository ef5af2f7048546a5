"""Architectures that don't ship with timm: their modules are imported where the encoder is made, and where
it is opened.

A module that calls timm's `register_model` adds to timm's list when it is imported. A run that only happens
to have imported it could train, but nobody could open what it exports.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from typing import Any

from pretrain.encoders.torchvision_compat import ensure_torchvision

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
    timm = _timm()
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


def is_own(name: str) -> bool:
    """Whether an architecture is somebody's own, not timm's."""
    home: str = _timm().model_entrypoint(name.partition(".")[0]).__module__
    return home != "timm" and not home.startswith("timm.")


def origins(name: str, imports: Iterable[str] = ()) -> list[str]:
    """Modules to be imported before timm can make `name`: none for timm's own.

    `imports`, and where there are none, the module that defines it.
    """
    named = list(imports)
    return (
        [_timm().model_entrypoint(name.partition(".")[0]).__module__] if not named and is_own(name) else named
    )


def opened_with(config: Any) -> list[str]:
    """The modules that an export's config.json says it needs; none where it isn't keel's."""
    keel = config.get("keel") if isinstance(config, dict) else None
    found = keel.get("imports") if isinstance(keel, dict) else None
    return [str(name) for name in found] if isinstance(found, list) else []


def _timm() -> Any:
    """Imported when it is asked: half of keel's commands never do."""
    ensure_torchvision()
    import timm

    return timm
