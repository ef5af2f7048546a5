"""Weights & Biases: the same run through every restart, offline where there is no key."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from torch import Tensor

from pretrain.types import Progress, Scores

log = logging.getLogger(__name__)


class Wandb:
    """Sends rows, scores and pictures. `already_sent` is the highest step an earlier attempt sent.

    Promise: a resumed run computes the same numbers, so those steps aren't sent again. What goes wrong in W&B
    ends no training: from then on this attempt goes without, and RUN/metrics.jsonl has everything.
    """

    def __init__(
        self,
        root: Path,
        *,
        mode: Literal["auto", "online", "offline"],
        project: str,
        name: str,
        tags: Sequence[str],
        run_id: str,
        settings: Mapping[str, object],
        already_sent: int,
    ) -> None:
        self.already_sent, self.gone = already_sent, False
        self.run: Any = _start(
            _mode(mode), dir=str(root), id=run_id, resume="allow", project=project, name=name,
            tags=list(tags), config=dict(settings),
        )  # fmt: skip

    def log(self, row: Mapping[str, float | int]) -> None:
        step = int(row["step"])
        if step > self.already_sent:
            self._log({_name(name): value for name, value in row.items() if name != "step"}, step)

    def evaluated(self, progress: Progress, scores: Scores) -> None:
        if progress.step > self.already_sent:
            values = {f"{scores.kind}/{name}": value for name, value in scores.values.items()}
            self._log(values, progress.step)

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None:
        if step > self.already_sent:
            import wandb

            shown = {
                f"pictures/{name}": wandb.Image(image.detach().float().cpu().permute(1, 2, 0).numpy())
                for name, image in images.items()
            }
            self._log(shown, step)

    def finish(self, status: str) -> None:
        def end() -> None:
            self.run.summary["reason"] = status
            self.run.finish()

        self._try(end)

    def _log(self, values: Mapping[str, object], step: int) -> None:
        self._try(lambda: self.run.log(dict(values), step=step))

    def _try(self, call: Callable[[], object]) -> None:
        """W&B's process is a child of the rank's: SLURM's SIGTERM ends it, while the rank wants to save."""
        if self.gone:
            return
        try:
            call()
        except Exception as error:
            self.gone = True
            log.warning("W&B is gone; going on without it until the next start: %r", error)


Mode = Literal["online", "offline", "disabled"]


def _start(mode: Mode, **arguments: Any) -> Any:
    """A W&B run. Where the server can't be had, an offline one: a tracker is no reason not to train."""
    import wandb  # takes seconds, so only where it is wanted

    quiet = wandb.Settings(silent=True, console="off", init_timeout=60)
    try:
        return wandb.init(mode=mode, settings=quiet, **arguments)
    except wandb.Error as error:
        if mode != "online":
            raise
        log.warning("W&B can't be reached, tracking offline; `wandb sync` sends it later: %s", error)
        return wandb.init(mode="offline", settings=quiet, **arguments)


def _mode(wanted: Literal["auto", "online", "offline"]) -> Mode:
    """`auto` asks nobody: with a key it is online. WANDB_MODE overrules it."""
    if wanted != "auto":
        return wanted
    match os.environ.get("WANDB_MODE"):
        case "online" | "offline" | "disabled" as named:
            return named
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether a W&B key lies where `wandb login` or a cluster's environment puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _name(name: str) -> str:
    """W&B draws panels by the part before the slash."""
    return name if "/" in name else f"train/{name}"
