"""Evaluations of a frozen model. The folder is the registry: `kind: knn` is `evaluators/knn.py`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from configs.loading import only_class
from pretrain.evaluators.subject import EvaluatorConfig

_MACHINERY = frozenset({"features", "ranks", "subject", "schedule", "sheets"})


def kinds() -> list[str]:
    """The evaluations that ship with keel."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _MACHINERY)


def evaluator_config_type(kind: str) -> type[EvaluatorConfig]:
    """The config class of a kind of evaluation; raises ValueError with what is allowed."""
    if kind not in kinds():
        near = difflib.get_close_matches(kind, kinds(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no such evaluation; known: {', '.join(kinds())}{hint}")
    module = importlib.import_module(f"{__name__}.{kind}")
    return only_class(module, EvaluatorConfig)  # type: ignore[type-abstract]  # only compared with


__all__ = ["EvaluatorConfig", "evaluator_config_type", "kinds"]
