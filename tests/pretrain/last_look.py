"""A look at an objective in the moment its training ends, with its weights still in the engine's hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pretrain.health.stopping import StopRequest
from pretrain.run.folder import RunFolder
from pretrain.run.main import train
from pretrain.trainer import Trainer

Found = TypeVar("Found")


def train_and_look(root: str, look: Callable[[Any], Found]) -> Found:
    """Train on this rank; gives what `look` makes of the objective, whole, before the engine lets it go."""
    found: list[Found] = []
    whole = Trainer.fit

    def fit(self: Any, progress: Any) -> Any:
        result = whole(self, progress)
        with self.engine.whole_parameters() as objective:
            found.append(look(objective))
        return result

    Trainer.fit = fit  # type: ignore[method-assign]
    try:
        train(RunFolder(Path(root)), StopRequest())
    finally:
        Trainer.fit = whole  # type: ignore[method-assign]
    return found[0]
