"""`keel report`: runs as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, shown together")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the file to write")] = Path("report.html"),
) -> None:
    """Show how runs went, as one HTML file that needs no network: curves, evaluations, pictures, settings."""
    from pretrain.report import report

    report(runs, out)
    typer.echo(f"{out}: open it in a browser")
