"""`keel submit`: a run to a cluster's queue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.runs import strict_json

DEFAULT = "clusters/slurm"


def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or one that ships with keel")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="a.b=c", help="settings; of the cluster: +nodes=2"),
    ] = None,
    cluster: Annotated[str, typer.Option("--cluster", metavar="FILE", help="where to run")] = DEFAULT,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the sbatch script and what each task runs; submit nothing")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Submit a run, or go on with one, as a job that requeues itself until the run is done."""
    from configs.loading import load
    from launch.progress import progress_bar
    from launch.slurm import submit
    from launch.slurm.cluster import load_cluster, parted
    from pretrain.config import RunConfig
    from pretrain.run.main import prepare

    own, site = parted(overrides or [])
    where, settings = load_cluster(cluster, site), load(config, RunConfig, own)
    submit.require_place([Path(settings.run.dir).expanduser().absolute()], where)
    if dry_run:
        settings.micro_batch(where.ranks)
        settings.train.require_device(where.gpu)
        typer.echo(submit.dry_run([Path(settings.run.dir).expanduser()], where))
        return
    with progress_bar("demo data") as progress:
        folder = prepare(settings, world_size=where.ranks, gpu=where.gpu, progress=progress)
    (job,) = submit.submit([folder.root], where)
    if as_json:
        typer.echo(strict_json.dumps({"job": job, "run": str(folder.root)}))
    else:
        typer.echo(f"job {job}; run folder: {folder.root}")
