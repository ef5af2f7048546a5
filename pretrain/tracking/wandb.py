"""Weights & Biases: the same run through every restart, offline where there is no key, uploaded later."""

from __future__ import annotations

import configparser
import json
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
from pretrain.clock import Progress
from pretrain.ports import Scores

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
        self.newest = already_sent
        # How many batches were skipped before this attempt is known where there was none.
        self.skipped: float | None = None if already_sent else 0
        self.run: Any = _start(
            _mode(mode), dir=str(root), id=run_id, resume="allow", project=project, name=_shown(name),
            tags=list(tags), group=group and _shown(group), job_type=_shown(job_type),
            config=json.loads(_sendable(json.dumps(dict(settings), ensure_ascii=False))),
        )  # fmt: skip
        self.gone = self.run is None

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
        if step > self.already_sent and not self.gone:
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
        if rows and self.newest > self.already_sent and not self.gone:
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
            log.warning(
                "W&B is gone; going on without it until the next start: %r (what it kept of this attempt: "
                "%s; `wandb sync` sends that)", error, self._kept(),
            )  # fmt: skip

    def _kept(self) -> str:
        """Where W&B writes this attempt down before it is sent."""
        files = getattr(self.run, "dir", None)
        return str(Path(files).parent if isinstance(files, str) else self.root / "wandb")


ALERTS: Mapping[str, tuple[str, str]] = {
    "done": ("done", "INFO"),
    "failed": ("failed", "ERROR"),
    "given up": ("ill, this attempt is given up", "ERROR"),
}
"""Ends that somebody wants to hear of, with W&B's level. Others go on by themselves, or were asked for."""

Mode = Literal["online", "offline", "disabled"]


INIT_PATIENCE, FINISH_PATIENCE = 30.0, 60.0
"""Seconds that W&B's server has to answer at the start of an attempt, and to take what is left at its end.

The end is as short as that because a job that was told to leave has a minute or two for everything.
"""


def _start(mode: Mode, **arguments: Any) -> Any:
    """A W&B run; an offline one where the server can't be had, None where not even that can be.

    A tracker is no reason not to train, whatever it raises.
    """
    try:
        import wandb  # takes seconds, so only where it is wanted

        settings = {"init_timeout": INIT_PATIENCE} | {
            name: value
            for name, value in (("finish_timeout", FINISH_PATIENCE), ("finish_timeout_raises", True))
            if name in wandb.Settings.model_fields  # not in older versions
        }
        quiet = wandb.Settings(silent=True, console="off", **settings)
        if mode == "online":
            try:
                return wandb.init(mode=mode, settings=quiet, **arguments)
            except Exception as error:
                log.warning("W&B can't be had, tracking offline; `keel sync` sends it later: %s", error)
                wandb.teardown()  # its service keeps the id of a run that failed, and would refuse it below
                mode = "offline"
        return wandb.init(mode=mode, settings=quiet, **arguments)
    except Exception as error:
        log.warning("W&B can't be started; going on without it until the next start: %r", error)
        return None


def _mode(wanted: Literal["auto", "online", "offline"]) -> Mode:
    """`auto` asks nobody: with a key it is online. WANDB_MODE overrules it."""
    if wanted != "auto":
        return wanted
    match os.environ.get("WANDB_MODE"):
        case "online" | "offline" | "disabled" as named:
            return named
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether a key for W&B's server lies where `wandb login` or a cluster's environment puts it."""
    named = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    return named or any(_in_netrc(host) for host in _hosts())


def _hosts() -> set[str]:
    """Names under which a key of the server in use may lie."""
    import wandb

    standard = str(wandb.Settings.model_fields["base_url"].default)
    used = os.environ.get("WANDB_BASE_URL") or _logged_in_at() or standard
    hosts = {urlsplit(used).netloc, urlsplit(used).hostname or ""}
    # The service has moved between versions of W&B's client; keys of before are still good.
    return hosts | {"api.wandb.ai"} if used == standard else hosts


def _logged_in_at() -> str | None:
    """The server that `wandb login --host` wrote into its settings: those of this folder, then the user's."""
    config = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
    for folder in (Path(os.environ.get("WANDB_DIR") or ".") / "wandb", Path(config)):
        said = configparser.ConfigParser(interpolation=None)
        try:
            said.read(folder / "settings")
            return said["default"]["base_url"]
        except (OSError, ValueError, KeyError, configparser.Error):
            continue
    return None


def _in_netrc(host: str) -> bool:
    home = Path.home()
    named = os.environ.get("NETRC")
    file = Path(named).expanduser() if named else home / ".netrc"
    if not named and not file.exists():
        file = home / "_netrc"
    try:
        found = netrc.netrc(file).authenticators(host)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return found is not None and bool(found[2])


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


def _sendable(text: str) -> str:
    """Names of folders are bytes; what isn't UTF-8 in them can't be sent."""
    return text.encode(errors="replace").decode()


def _shown(name: str) -> str:
    """As long as W&B takes it: a name is a folder's unless told otherwise, up to 255 bytes."""
    return _sendable(name)[:128]


def _name(name: str) -> str:
    """W&B draws panels by the part before the slash."""
    return name if "/" in name else f"train/{name}"
