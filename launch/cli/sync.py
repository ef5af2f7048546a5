"""`keel sync`: W&B's offline folders of runs, uploaded where there is a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import RunError
from launch.runs.registry import list_runs


def sync(
    roots: Annotated[
        list[Path], typer.Argument(metavar="RUN|ROOT...", help="run folders, or folders of runs")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be sent")] = False,
) -> None:
    """Upload what W&B kept offline, by its own command; each run stays one run whatever its restarts."""
    from pretrain.tracking.wandb import offline_folders, upload

    folders: list[Path] = []
    for run, state in tracked_offline(roots).items():
        if state == "running":  # half of its file would be taken for the whole
            typer.echo(f"{run}: is being trained; sync it afterwards")
            continue
        found = offline_folders(run)
        sent = any(run.glob("wandb/offline-run-*/*.wandb.synced"))
        nothing = "all is sent" if sent else "W&B kept nothing of it"
        typer.echo(f"{run}: {len(found)} to send" if found else f"{run}: {nothing}")
        folders += found
    if folders and not dry_run:
        upload(folders)


def tracked_offline(roots: Sequence[Path]) -> dict[Path, str]:
    """State of every run at or below the roots that W&B tracked offline.

    Raises `RunError` for a root without any.
    """
    found: dict[Path, str] = {}
    for root in roots:
        runs = {Path(run.path): run.state for run in list_runs(root.expanduser().absolute())}
        own = {run: state for run, state in runs.items() if list(run.glob("wandb/offline-run-*"))}
        if not own:
            raise RunError(
                f"{root}: no run in it was tracked offline by W&B (wandb/offline-run-*); name run folders, "
                "or a folder of them"
            )
        found |= own
    return found
