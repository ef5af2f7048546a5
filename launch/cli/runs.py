"""`keel runs`, `logs`, `cancel`, `resume` and `best`: what is done with runs once they exist."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.runs import strict_json

if TYPE_CHECKING:
    from launch.runs.registry import Run
    from launch.slurm.manage import Candidate

Folders = Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output")]
Lower = Annotated[
    bool | None,
    typer.Option("--lower/--higher", help="which is better; by default lower for losses and errors"),
]

REFRESH = 10.0
"""Seconds between two tables of `--watch`; as often as a run says that it lives."""


def add_to(app: typer.Typer) -> None:
    """Give `app` the commands of this module."""
    for command in (runs, logs, cancel, resume, best):
        app.command()(command)


def runs(
    root: Annotated[Path, typer.Argument(metavar="[ROOT]", help="where the runs lie")] = Path("runs"),
    sort: Annotated[str, typer.Option(metavar="KEY", help="a column; -KEY: the largest first")] = "name",
    metric: Annotated[
        str | None, typer.Option(help="of evaluations, such as knn/top1; else each run's first")
    ] = None,
    lower: Lower = None,
    watch: Annotated[bool, typer.Option("--watch", help="again every 10 s, until Ctrl-C")] = False,
    as_json: AsJson = False,
) -> None:
    """One table of the runs below ROOT: how each stands, by its files and by SLURM."""
    from launch.runs.registry import list_runs, sorter

    order, down = sorter(sort.removeprefix("-")), sort.startswith("-")

    def listed() -> list[Run]:
        found = sorted(list_runs(root, metric=metric, lower=lower), key=lambda run: order(run)[0])
        known = [run for run in found if not order(run)[0]]
        return sorted(known, key=lambda run: order(run)[1], reverse=down) + found[len(known) :]

    if as_json:
        typer.echo(strict_json.dumps([asdict(run) for run in listed()]))
        return
    try:
        _show(listed())
        while watch:
            time.sleep(REFRESH)
            _show(listed(), again=True)
    except KeyboardInterrupt:
        raise typer.Exit() from None


def _show(found: list[Run], *, again: bool = False) -> None:
    import shutil
    import sys

    from launch.runs.table import summary, table

    screen = sys.stdout.isatty()
    wide = shutil.get_terminal_size().columns if screen else None
    clear = "\x1b[H\x1b[2J" if screen and again else ""
    typer.echo(clear + (table(found, width=wide, colour=screen) + "\n" if found else "") + summary(found))


def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="wait for more, until Ctrl-C")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="whose log; by default rank 0's")] = None,
    last: Annotated[int, typer.Option("-n", "--lines", min=0, help="from the end; 0: all")] = 100,
) -> None:
    """Show what a run has printed, or its job where no rank has begun."""
    from launch.slurm import manage

    try:
        for line in manage.lines(manage.log_of(run, rank), last, follow=follow):
            typer.echo(line)
    except KeyboardInterrupt:
        raise typer.Exit() from None


def cancel(
    folders: Folders,
    now: Annotated[bool, typer.Option("--now", help="at once, without a last checkpoint")] = False,
    as_json: AsJson = False,
) -> None:
    """End runs for good: they save and leave, and their jobs don't come back."""
    from launch.slurm import manage

    told = manage.cancel(folders, now=now)
    if as_json:
        typer.echo(strict_json.dumps([{"run": run.path, "job": run.job, "told": what} for run, what in told]))
    else:
        typer.echo("\n".join(f"{run.path}: {what}" for run, what in told))


def resume(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...|ROOT", help="run folders, or a folder of runs")
    ],
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="FILE", help="where; by default where it was")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="ranks of what runs on this machine")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list them")] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with the runs named; of a folder of runs, with those that failed, were preempted or are lost."""
    from launch.slurm import manage

    chosen = manage.resumable(folders)
    if as_json:
        typer.echo(
            strict_json.dumps([{"run": run.path, "was": run.state, "note": run.note} for run in chosen])
        )
    else:
        for run in chosen:
            typer.echo(f"{run.path}: was {run.state}{f' ({run.note})' if run.note else ''}")
        if not chosen:
            typer.echo("nothing to resume")
    if chosen and not dry_run:
        say = (lambda line: typer.echo(line, err=True)) if as_json else typer.echo
        raise typer.Exit(manage.resume(chosen, cluster, nproc, say=say))


def best(
    root: Annotated[Path, typer.Argument(metavar="SWEEP", help="a folder of runs")],
    metric: Annotated[str, typer.Option(help="such as knn/top1, or loss")],
    lower: Lower = None,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write the winner there as a timm folder")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an older export there")] = False,
    as_json: AsJson = False,
) -> None:
    """Rank runs by a metric, and export the winner."""
    from launch.slurm import manage

    found = manage.ranking(root, metric, lower=lower)
    if metric.rpartition("/")[0] in manage.BY_THE_OBJECTIVE and (
        differing := manage.differing_objectives(found)
    ):
        typer.echo(f"note: {', '.join(differing)} differs among these runs, and {metric} may depend on it; "
                   "an evaluation such as knn/top1 compares them", err=True)  # fmt: skip
    if as_json:
        typer.echo(strict_json.dumps([_ranked(one) for one in found]))
    else:
        for one in found:
            typer.echo(_rank_line(one))
    if export is not None:
        _export_winner(found, metric, export, force, as_json)


def _ranked(one: Candidate) -> dict[str, object]:
    return {
        "run": one.run.path, "value": one.score.value, "step": one.score.step, "state": one.run.state,
        "exportable": one.exportable, "comparable": one.comparable, "note": one.run.note,
    }  # fmt: skip


def _rank_line(one: Candidate) -> str:
    remarks = [] if one.comparable else ["not finite: has no place"]
    remarks += [] if one.exportable else ["no checkpoint of that step"]
    remarks += [one.run.note] if one.run.state != "done" and one.run.note else []
    told = f"  ({'; '.join(remarks)})" if remarks else ""
    return f"{one.score.value:10.4g}  step {one.score.step:<8} {one.run.state:<10} {one.run.name}{told}"


def _export_winner(found: list[Candidate], metric: str, to: Path, force: bool, as_json: bool) -> None:
    from configs.errors import RunError
    from pretrain.export.timm_folder import export as write

    comparable = [one for one in found if one.comparable]
    if not comparable:
        raise RunError(f"--metric: {metric} is finite in none of these runs, so there is no winner to export")
    winner = next((one for one in comparable if one.exportable), comparable[0])
    step = winner.score.step if winner.exportable else None
    result = write(Path(winner.run.path), to, step=step, force=force)
    state = "" if winner.run.state == "done" else f" (a run that is {winner.run.state})"
    opened = f'timm.create_model("local-dir:{result.folder}", pretrained=True)'
    typer.echo(f"{winner.run.name}{state} exported; {opened}", err=as_json)
