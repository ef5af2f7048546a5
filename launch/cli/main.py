"""The command line: `keel`, or `python -m launch`.

Exit codes: 0 done, 2 the user's input, 3 stopped early with a valid checkpoint, 1 our fault. Commands import
what they need when they run: `keel --help` must not wait for torch.
"""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import UserError, fault_of_place
from launch.cli import checkpoint, data, doctor, replay, report, runs, submit, sweep, sync
from launch.ranks.job import OUR_FAULT, USERS_INPUT, as_lines

DEMO = Path("runs/demo")
"""Where `make demo` puts its run."""

FINE_TUNING = "finetune/vitb16_in1k"
"""MAE's recipe."""

app = typer.Typer(
    name="keel",
    help="Tar shards in, a pretrained timm backbone out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(submit.submit)
app.command()(replay.replay)
runs.add_to(app)
app.command()(sweep.sweep)
app.command()(doctor.doctor)
app.command()(report.report)
app.command()(sync.sync)


Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="settings to override")]
Ranks = Annotated[int, typer.Option("--nproc", min=1, help="ranks on this machine")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]


class DeviceName(StrEnum):
    """Where a model is judged or fine-tuned."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Device = Annotated[DeviceName, typer.Option(help="auto takes a GPU where there is one")]
Step = Annotated[int | None, typer.Option(help="of the checkpoint; without it the newest")]


@app.callback()
def _options() -> None:
    """Tar shards in, a pretrained timm backbone out."""


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="a YAML file, or one that ships with keel: demo/mae")
    ],
    overrides: Overrides = None,
    nproc: Ranks = 1,
    fork: Annotated[
        Path | None, typer.Option("--fork", metavar="RUN", help="start a new run from this one's checkpoint")
    ] = None,
    step: Annotated[int | None, typer.Option(help="of the checkpoint to fork; without it the newest")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="the fork's clock and data start at nothing")] = False,
) -> None:
    """Train, or go on where the run folder's newest checkpoint left off."""
    from configs.loading import load
    from launch.progress import progress_bar
    from launch.ranks.local import launch
    from pretrain.config import RunConfig
    from pretrain.run.fork import Fork
    from pretrain.run.main import prepare

    if fork is None and (step is not None or anew):
        raise UserError("--step and --anew belong to --fork RUN")
    branch = None if fork is None else Fork(fork, step, anew)
    with progress_bar("demo data") as progress:
        settings = load(config, RunConfig, overrides or ())
        folder = prepare(settings, world_size=nproc, progress=progress, fork=branch)
    code = launch(folder, nproc, last=True)
    if code == 0:
        typer.echo(f"done; run folder: {folder.root}")
    raise typer.Exit(code)


@app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="a run folder, an exported folder, or a timm name")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE", help="of the evaluation: k=10")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="a labelled manifest, or a folder with train/ and val/ ones")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="knn, linear, ...; several may be given")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="another to judge alike, beside it in the table"),
    ] = None,
    step: Step = None,
    device: Device = DeviceName.auto,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes that decode; by default one a processor, at most 8")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON list on standard output")] = False,
) -> None:
    """Judge an encoder: by the run's own evaluations, or by those given."""
    from launch.cli import evaluate

    evaluations = evaluate.wanted(source, settings or (), kind or (), data)
    found = evaluate.evaluate(
        [source, *(against or ())], evaluations, step, device=device.value, workers=workers
    )
    evaluate.show(found, as_json=as_json)
    for file in evaluate.save_pictures(source, found[source]):
        typer.echo(f"picture: {file}", err=as_json)


@app.command()
def finetune(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="a run folder, an exported folder, or a timm name")
    ],
    data: Annotated[Path, typer.Option(help="folder with labelled train/ and val/ manifests")],
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="a YAML file, or one that ships with keel")] = FINE_TUNING,
    to: Annotated[Path | None, typer.Option(help="folder to make of the classifier, for timm")] = None,
    scratch: Annotated[bool, typer.Option("--scratch", help="with random weights, for comparison")] = False,
    step: Step = None,
    seed: Annotated[int, typer.Option(help="of order, crops, mixing and the new layer")] = 0,
    device: Device = DeviceName.auto,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Train an encoder end to end as a classifier, judge it, and write it for timm."""
    from configs.loading import load
    from launch.cli import finetune
    from pretrain.finetune import FineTuneConfig, start_of

    settings = load(config, FineTuneConfig, overrides or ())
    start = start_of(
        source, step=step, scratch=scratch, seed=seed, pooling=settings.pooling,
        image_size=settings.image_size,
    )  # fmt: skip
    found = finetune.run(
        start, data.expanduser(), settings, seed=seed, workers=workers, to=to, device=device.value
    )
    finetune.show(source, found, as_json=as_json)


class ExportFormat(StrEnum):
    """What opens an export."""

    timm = "timm"
    open_clip = "open_clip"
    hf = "hf"

    @property
    def call(self) -> str:
        """What opens the folder `{}`."""
        if self == ExportFormat.open_clip:
            return 'open_clip.create_model_from_pretrained("local-dir:{}")'
        return 'timm.create_model("local-dir:{}", pretrained=True)'


class ExportWeights(StrEnum):
    """Which of the encoders that a run keeps."""

    model = "model"
    ema = "ema"
    teacher = "teacher"


@app.command()
def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="folder to make, for timm's or open_clip's local-dir:")],
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="the encoder for timm or for a hub, or both towers for open_clip"),
    ] = ExportFormat.timm,
    step: Step = None,
    weights: Annotated[
        ExportWeights,
        typer.Option(help="model: what the gradient trains; teacher, ema: MoCo's key encoder, its average"),
    ] = ExportWeights.model,
    force: Annotated[bool, typer.Option("--force", help="replace an older export there")] = False,
    licence: Annotated[str, typer.Option(help="of the weights, for the model card")] = "other",
) -> None:
    """Write what was trained as a folder; done when a fresh process got the same numbers from it."""
    from pretrain.export import open_clip_folder, timm_folder

    if form == ExportFormat.open_clip:
        if weights != ExportWeights.model:
            raise UserError(f"--weights: found {weights.value}; open_clip's pair has one: model")
        result = open_clip_folder.export(run, to, step=step, force=force, licence=licence)
    else:
        kind: timm_folder.Format = "hf" if form == ExportFormat.hf else "timm"
        result = timm_folder.export(
            run, to, step=step, weights=weights.value, form=kind, force=force, licence=licence
        )
    typer.echo(f"{result.architecture}, {result.parameters / 1e6:.2f} M parameters")
    opened = "timm from a hub's cache" if form == ExportFormat.hf else form.value
    typer.echo(f"reopened by {opened} in a fresh process: largest difference {result.max_difference:.1e}")
    for remark in result.remarks:
        typer.echo(f"note: {remark}")
    typer.echo(form.call.format(result.folder))


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="where its runs and data go")] = DEMO,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="ranks on this machine; by default 2, or 1 on a single GPU")
    ] = None,
) -> None:
    """The whole of keel in a few minutes: three objectives trained, judged in one table, exported to timm."""
    from launch.demo.demo import run

    raise typer.Exit(run(directory, overrides=overrides or (), nproc=nproc))


def main() -> None:
    """The `keel` command: a user's error is a line, our own keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text
            stream.reconfigure(errors=ODD_NAMES)
    sys.exit(_delivered(_called()))


def _called() -> str | int | None:
    """Run the command that `sys.argv` holds; gives its exit code."""
    try:
        app(prog_name="keel")
    except SystemExit as ended:
        # click ends with 1 where the reader of a pipe has left.
        return PIPE_CLOSED if isinstance(ended.__context__, BrokenPipeError) else ended.code
    except UserError as error:
        print(as_lines(error), file=sys.stderr)
        return USERS_INPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and (known := fault_of_place(error)) is not None:
            print(as_lines(known), file=sys.stderr)
            return USERS_INPUT
        traceback.print_exc()
        return OUR_FAULT
    return None


def _delivered(code: str | int | None) -> str | int | None:
    """The exit code, once all that was printed has gone out."""
    try:
        sys.stdout.flush()
    except OSError as error:  # the reader of a pipe has left, or the disk behind `>` is full
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # else the interpreter would try again, and complain
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        return code or USERS_INPUT
    return code


PIPE_CLOSED = 128 + signal.SIGPIPE

ODD_NAMES = "keel-odd-names"
"""How our output treats what its encoding can't say: bytes of a file's name as they are, the rest escaped."""


def _odd_names(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(ODD_NAMES, _odd_names)
