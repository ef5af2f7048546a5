"""Pretext tasks. The folder is the registry: `name: mae` in a config is `objectives/mae.py`.

A module offers one `ObjectiveConfig` subclass of its own. A dotted name (`mylab.methods.jigsaw`) imports a
module from outside, so a method needs no change here.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from configs.loading import only_class
from pretrain.objective import ObjectiveConfig


def names() -> list[str]:
    """The objectives that ship with keel."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def config_type(name: str) -> type[ObjectiveConfig]:
    """The config class of an objective; raises ValueError with what is allowed."""
    if "." not in name and name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no such objective; known: {', '.join(names())}{hint}")
    path = name if "." in name else f"{__name__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise
        raise ValueError("no module of this name can be imported") from error
    return only_class(module, ObjectiveConfig)  # type: ignore[type-abstract]  # only compared with
