"""`keel replay`: a step of a run once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    step: Annotated[int, typer.Option(min=1, help="the step to compute again")],
    attempt: Annotated[
        int | None,
        typer.Option(help="as this attempt saw it; without it the run as it stands"),
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="batches to try until one is applied")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output")] = False,
) -> None:
    """Compute a step of a run again, from the nearest checkpoint; nothing in the run is changed."""
    import json
    from dataclasses import asdict

    from launch.progress import progress_bar
    from pretrain.run import replay

    found = []
    with progress_bar("steps before") as progress:
        for each in replay.replay(run, step, attempt=attempt, most=most, came=progress):
            found.append(each)
            if not as_json:
                typer.echo("\n".join(lines(each)))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found]))


def lines(told: object) -> list[str]:
    """A replayed batch as it is shown."""
    from pretrain.run.replay import Replayed

    assert isinstance(told, Replayed)
    fate = "applied" if told.applied else "not finite, not applied"
    norm = "" if told.grad_norm is None else f"  grad norm {told.grad_norm:.6g}"
    first = f"step {told.step}, samples {told.position} on: {fate}  loss {told.loss:.6g}{norm}"
    rows = [
        f"  micro-batch {number}: loss {each.loss:.6g}  grad norm {each.grad_norm:.6g}"
        for number, each in enumerate(told.micro_batches)
    ]
    return [first, *rows]
