"""`keel sweep`: many runs of one question."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.runs import strict_json


def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP", help="a YAML file, or one that ships with keel")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="a.b=c", help="of the sweep; of the cluster: +nodes=2")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="FILE", help="where to run; by default this machine")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks of each run on this machine")] = 1,
    at_most: Annotated[
        int | None, typer.Option(min=1, help="so many of those that are due now, the rest another time")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the runs, show the sbatch script; submit nothing")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="the runs as a JSON list on standard output")
    ] = False,
) -> None:
    """Submit the runs of a sweep that are missing or have failed; those that are well are left alone."""
    from launch.progress import progress_bar
    from launch.slurm.cluster import load_cluster, parted
    from launch.slurm.submit import require_place
    from launch.sweeps import sweep as sweeps

    settings, site = parted(overrides or [])
    where = load_cluster(cluster, site) if cluster else None
    asked = sweeps.load_sweep(file, settings)
    planned = sweeps.plan(asked, at_most)
    due = sum(one.due for one in planned)
    if as_json:
        typer.echo(strict_json.dumps(sweeps.listing(planned)))
    elif dry_run:
        for one in planned:
            typer.echo(f"{one.member.name}  {one.state}" + ("  -> submit" if one.due else ""))
    said = f"{asked.dir}: {len(planned)} runs, {due} to submit, {asked.parallel} at a time"
    typer.echo(said, err=as_json)
    ranks, gpu = (where.ranks, where.gpu) if where else (nproc, None)
    for remark in sweeps.remarks(asked, planned):
        typer.echo(f"note: {remark}", err=True)
    if where:
        require_place([one.folder for one in planned], where)
    if dry_run:
        sweeps.require_fitting(planned, ranks, gpu)
        if where and due:
            typer.echo(sweeps.script(asked, planned, where), err=as_json)
        return
    with progress_bar("making ready") as progress:
        sweeps.make_ready(planned, ranks, progress, gpu)
    code = sweeps.start(
        asked, planned, cluster=where, nproc=nproc, say=lambda line: typer.echo(line, err=as_json)
    )
    raise typer.Exit(code)
