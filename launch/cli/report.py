"""`keel report`: runs as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...|ROOT", help="run folders, or folders of runs, shown together"),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="the file to write")] = Path("report.html"),
) -> None:
    """Show how runs went, as one HTML file that needs no network: curves, evaluations, pictures, settings."""
    from launch.runs.registry import look
    from pretrain.report import report
    from pretrain.report.reading import run_folders

    places, _ = run_folders(runs)
    states = {Path(run.path): (run.state, run.note) for run in look(places)}
    for place, why in report(runs, out, states):
        typer.echo(f"left out: {why if place in why else f'{place}: {why}'}", err=True)
    typer.echo(f"{out}: open it in a browser")
