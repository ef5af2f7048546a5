"""`keel doctor`: a run looked at before it is started."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

_COLOURS = {"pass": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}


def doctor(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or one that ships with keel")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="a.b=c", help="settings; of the cluster: +nodes=2")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="FILE", help="where it is to run; by default here")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks on this machine")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON list on standard output")] = False,
) -> None:
    """Find what would stop a run before it waits in a queue. Exit code 2 where something fails."""
    from launch.doctor import examine
    from launch.slurm.cluster import load_cluster, parted

    settings, site = parted(overrides or [])
    where = load_cluster(cluster, site) if cluster else None
    found = examine(config, settings, where, nproc)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in found]))
    else:
        for check in found:
            verdict = typer.style(check.verdict, fg=_COLOURS[check.verdict])
            typer.echo(f"{verdict}  {check.name}: {check.found}" + (f"; {check.fix}" if check.fix else ""))
    raise typer.Exit(2 if any(check.verdict == "fail" for check in found) else 0)
