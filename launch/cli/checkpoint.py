"""`keel checkpoint`: list, verify and prune what a run has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DAMAGED = 1
"""Exit code of `verify` where a checkpoint is damaged: not the user's input, and nothing to go on from."""

app = typer.Typer(help="List, verify and prune the checkpoints of a run.", no_args_is_help=True)
Run = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output")]


@app.command(name="list")
def list_(run: Run, as_json: AsJson = False) -> None:
    """What lies there, the newest first: step, attempt, size, and why it is kept for good."""
    import json
    from dataclasses import asdict

    from launch.runs.checkpoints import listing

    found = listing(run)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    typer.echo(f"{'step':>10}{'attempt':>9}{'samples':>14}{'MB':>11}{'ranks':>7}{'ZeRO':>6}  saved")
    for each in found:
        facts = ["?" if fact is None else fact for fact in (each.samples, each.ranks, each.zero_stage)]
        row = f"{each.step:>10}{each.attempt:>9}{facts[0]:>14}{each.bytes / 1e6:>11.1f}"
        notes = [f"kept: {reason}" for reason in each.pins] + ([each.problem] if each.problem else [])
        typer.echo("  ".join([f"{row}{facts[1]:>7}{facts[2]:>6}", each.saved, *notes]))
    if not found:
        typer.echo("no checkpoint yet")


@app.command()
def verify(
    run: Run,
    step: Annotated[int | None, typer.Option(help="only this one")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte and compare checksums. Exit code 1 where one is damaged, naming the file."""
    import json
    from dataclasses import asdict

    from launch.runs.checkpoints import verify as check

    verdicts = []
    for verdict in check(run, step):
        verdicts.append(verdict)
        if not as_json:
            typer.echo(f"{verdict.name}: {verdict.problem or 'whole'}")
    if as_json:
        typer.echo(json.dumps([asdict(verdict) for verdict in verdicts]))
    raise typer.Exit(DAMAGED if any(verdict.problem for verdict in verdicts) else 0)


@app.command()
def prune(
    run: Run,
    keep: Annotated[int, typer.Option(min=1, help="newest valid ones to keep, the pinned aside")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go; remove nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints. The newest valid one and the pinned ones always stay."""
    import json

    from launch.runs.checkpoints import prune as remove

    removed = remove(run, keep, dry_run)
    if as_json:
        typer.echo(json.dumps({"removed": list(removed), "dry_run": dry_run}))
        return
    for name in removed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    if not removed:
        typer.echo("nothing to remove")
