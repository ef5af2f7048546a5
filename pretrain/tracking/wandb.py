"""Weights & Biases: the same run through every restart, offline where there is no key, uploaded later."""

from __future__ import annotations

import logging
import math
import netrc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from torch import Tensor

from configs.errors import RunError
from pretrain.types import Progress, Scores

log = logging.getLogger(__name__)


class Wandb:
    """Sends rows, scores and pictures, and says when a run falls ill or ends.

    `already_sent` is the highest step an earlier attempt sent: a resumed run computes the same numbers, so
    those steps aren't sent again. `evaluations` gives the whole run's record, for one table at the end. What
    goes wrong in W&B ends no training: from then on this attempt goes without, and RUN/metrics.jsonl has
    everything.
    """

    def __init__(
        self,
        root: Path,
        *,
        mode: Literal["auto", "online", "offline"],
        project: str,
        name: str,
        tags: Sequence[str],
        group: str | None,
        job_type: str,
        run_id: str,
        settings: Mapping[str, object],
        already_sent: int,
        evaluations: Callable[[], Sequence[Mapping[str, Any]]],
    ) -> None:
        self.root, self.name, self.already_sent, self.evaluations = root, name, already_sent, evaluations
        self.newest, self.gone = already_sent, False
        # How many batches were skipped before this attempt is known where there was none.
        self.skipped: float | None = None if already_sent else 0
        self.run: Any = _start(
            _mode(mode), dir=str(root), id=run_id, resume="allow", project=project, name=name,
            tags=list(tags), group=group, job_type=job_type, config=dict(settings),
        )  # fmt: skip

    def log(self, row: Mapping[str, float | int]) -> None:
        step = int(row["step"])
        if step > self.already_sent:
            self._send({_name(name): value for name, value in row.items() if name != "step"}, step)
            self._watch(row)

    def evaluated(self, progress: Progress, scores: Scores) -> None:
        if progress.step > self.already_sent:
            values = {f"{scores.kind}/{name}": value for name, value in scores.values.items()}
            self._send(values, progress.step)

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None:
        if step > self.already_sent:
            import wandb

            shown = {
                f"pictures/{name}": wandb.Image(
                    image.detach().float().cpu().permute(1, 2, 0).numpy(), caption=f"{name}, step {step}"
                )
                for name, image in images.items()
            }
            self._send(shown, step)

    def finish(self, status: str) -> None:
        self._send_table()
        if status in ALERTS:
            self._alert(*ALERTS[status], f"at step {self.newest}; run folder: {self.root}")

        def end() -> None:
            self.run.summary["reason"] = status
            self.run.finish(exit_code=1 if status == "failed" else 0)

        self._try(end)

    def _send_table(self) -> None:
        """Every score of the run in one table."""
        rows = [
            [row["step"], row["samples"], row["name"], name, float(value)]
            for row in self.evaluations()
            for name, value in row["values"].items()
        ]
        if rows and self.newest > self.already_sent:
            import wandb

            columns = ["step", "samples", "evaluation", "figure", "value"]
            self._send({"evaluations": wandb.Table(columns=columns, data=rows)}, self.newest)

    def _send(self, values: Mapping[str, object], step: int) -> None:
        self.newest = max(self.newest, step)
        self._try(lambda: self.run.log(dict(values), step=step))

    def _watch(self, row: Mapping[str, float | int]) -> None:
        """Say what isn't finite: a figure of this row, or updates since the row before."""
        watched = {name: row[name] for name in ("loss", "grad_norm") if name in row}
        ill = [f"{name} is {value}" for name, value in watched.items() if not math.isfinite(value)]
        before, self.skipped = self.skipped, row.get("skipped_batches", 0)
        if before is not None and self.skipped > before:
            ill.append(f"{self.skipped - before:g} batches were skipped")
        if ill:
            self._alert(
                "not finite", "WARN", f"step {row['step']}: {', '.join(ill)}; run folder: {self.root}"
            )

    def _alert(self, title: str, level: str, text: str) -> None:
        self._try(lambda: self.run.alert(title=f"{self.name}: {title}", text=text, level=level))

    def _try(self, call: Callable[[], object]) -> None:
        """W&B's process is a child of the rank's: SLURM's SIGTERM ends it, while the rank wants to save."""
        if self.gone:
            return
        try:
            call()
        except Exception as error:
            self.gone = True
            log.warning("W&B is gone; going on without it until the next start: %r", error)


ALERTS: Mapping[str, tuple[str, str]] = {
    "done": ("done", "INFO"),
    "failed": ("failed", "ERROR"),
    "given up": ("ill, this attempt is given up", "ERROR"),
}
"""Ends that somebody wants to hear of, with W&B's level. Others go on by themselves, or were asked for."""

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


def offline_folders(run: Path) -> list[Path]:
    """What W&B wrote without a network and hasn't uploaded yet, oldest first: an attempt each."""
    found = sorted((run / "wandb").glob("offline-run-*"))
    return [one for one in found if list(one.glob("*.wandb")) and not list(one.glob("*.wandb.synced"))]


def upload(folders: Sequence[Path]) -> None:
    """Send offline folders to W&B by its own command, `wandb sync`, whose output is shown.

    Those of one run become one run. Raises `RunError` where there is no key or the command fails.
    """
    if not has_key():
        raise RunError(
            "W&B: no key is here; run `wandb login`, or set WANDB_API_KEY (and WANDB_BASE_URL for a server "
            "of your own)"
        )
    beside = Path(sys.executable).with_name("wandb")
    command = str(beside) if beside.is_file() else shutil.which("wandb")
    if command is None:
        raise RunError("W&B: its command `wandb` isn't here; install keel's requirements again")
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    environment["WANDB_DIR"] = str(folders[0].parent.parent)  # its own log: not into whatever folder this is
    done = subprocess.run([command, "sync", *map(str, folders)], env=environment, check=False)
    if done.returncode:
        raise RunError(
            f"W&B: `wandb sync` failed (exit code {done.returncode}); what it says stands above. "
            "Run keel sync again: what was sent isn't sent twice"
        )


def _name(name: str) -> str:
    """W&B draws panels by the part before the slash."""
    return name if "/" in name else f"train/{name}"
