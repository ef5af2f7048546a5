"""Evaluations of a frozen model. The folder is the registry: `kind: knn` is `evaluators/knn.py`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from configs.loading import only_class
from pretrain.judging.subject import EvaluatorConfig


def kinds() -> list[str]:
    """The evaluations that ship with keel: modules that define a config whose `kind` is the module's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if _config_in(module.name))


def _config_in(name: str) -> type[EvaluatorConfig] | None:
    """The config that the module `name` of this folder defines; None where it is no evaluation's."""
    module = importlib.import_module(f"{__name__}.{name}")
    try:
        found = only_class(module, EvaluatorConfig)  # type: ignore[type-abstract]  # only compared with
    except ValueError:
        return None
    return found if found.model_fields["kind"].default == name else None


def evaluator_config_type(kind: str) -> type[EvaluatorConfig]:
    """The config class of a kind of evaluation; raises ValueError with what is allowed."""
    there = kind in {module.name for module in pkgutil.iter_modules(__path__)}
    found = _config_in(kind) if there else None
    if found is not None:
        return found
    known = kinds()
    near = difflib.get_close_matches(kind, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"no such evaluation; known: {', '.join(known)}{hint}")


__all__ = ["EvaluatorConfig", "evaluator_config_type", "kinds"]
