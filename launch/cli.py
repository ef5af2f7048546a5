"""The command line: `keel`, or `python -m launch`.

Exit codes: 0 done, 2 the user's input, 3 stopped early with a valid checkpoint, 1 our fault. Commands import
what they need when they run: `keel --help` must not wait for torch.
"""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Annotated

import typer

from configs.errors import UserError
from launch import cli_data
from launch.job import OUR_FAULT, USERS_INPUT, as_lines

app = typer.Typer(
    name="keel",
    help="Tar shards in, a pretrained timm backbone out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_data.app, name="data")


@app.callback()
def _options() -> None:
    """Tar shards in, a pretrained timm backbone out."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="a YAML file, or one that ships with keel: demo/mae")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks on this machine")] = 1,
) -> None:
    """Train, or go on where the run folder's newest checkpoint left off."""
    from configs.loading import load
    from launch.local import launch
    from launch.progress import progress_bar
    from pretrain.config import RunConfig
    from pretrain.run import prepare

    with progress_bar("demo data") as progress:
        folder = prepare(load(config, RunConfig, overrides or ()), world_size=nproc, progress=progress)
    code = launch(folder, nproc)
    if code == 0:
        typer.echo(f"done; run folder: {folder.root}")
    raise typer.Exit(code)


def main() -> None:
    """The `keel` command: a user's error is a line, our own keeps its traceback."""
    try:
        app()
    except UserError as error:
        print(as_lines(error), file=sys.stderr)
        sys.exit(USERS_INPUT)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception:
        traceback.print_exc()
        sys.exit(OUR_FAULT)
