"""`keel sync`: W&B's offline folders of runs, uploaded where there is a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import RunError
from launch.run_files import run_folders


def sync(
    roots: Annotated[
        list[Path], typer.Argument(metavar="RUN|ROOT...", help="run folders, or folders of runs")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be sent")] = False,
) -> None:
    """Upload what W&B kept offline, by its own command; each run stays one run whatever its restarts."""
    from pretrain.tracking.wandb import offline_folders, upload

    waiting = {run: offline_folders(run) for run in runs_in(roots)}
    folders = [folder for found in waiting.values() for folder in found]
    if not folders:
        typer.echo("nothing to send: all that W&B kept offline is uploaded")
        return
    for run, found in waiting.items():
        typer.echo(f"{run}: {len(found)} to send")
    if not dry_run:
        upload(folders)


def runs_in(roots: Sequence[Path]) -> list[Path]:
    """Runs at or below each root that have been tracked offline.

    Raises `RunError` for a root without any.
    """
    found: dict[Path, None] = {}
    for root in roots:
        place = root.expanduser().absolute()
        runs = [run for run in sorted(run_folders(place)) if list(run.glob("wandb/offline-run-*"))]
        if not runs:
            raise RunError(
                f"{root}: no run in it was tracked offline by W&B (wandb/offline-run-*); name "
                "run folders, or a folder of them"
            )
        found |= dict.fromkeys(runs)
    return list(found)
