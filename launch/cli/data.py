"""`keel data ...`: make, check and look at data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest

app = typer.Typer(help="Make, check and look at data sets.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", help="folder to make")]
Set = Annotated[Path, typer.Argument(help="a manifest.json or its folder")]


@app.command()
def demo(
    name: Annotated[
        Literal["digits", "shapes"], typer.Argument(help="digits: real; shapes: drawn, captioned")
    ],
    out: Out,
    size: Annotated[int, typer.Option(min=8, help="side of the pictures in pixels")] = 32,
    seed: Annotated[int, typer.Option(help="of the split, or of the drawings")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="training pictures (shapes)")] = 24_000,
    val_samples: Annotated[int, typer.Option(min=1, help="validation pictures (shapes)")] = 2_000,
    difficulty: Annotated[Literal["v3", "easy"], typer.Option(help="of shapes")] = "v3",
) -> None:
    """Make demo data in OUT/train and OUT/val, without a network. What is there already is kept."""
    from data_pipeline.demo import DemoConfig, make
    from data_pipeline.manifest import Manifest
    from launch.progress import progress_bar

    config = DemoConfig(
        name=name, size=size, seed=seed, samples=samples, val_samples=val_samples, difficulty=difficulty
    )
    with progress_bar(name) as progress:
        make(config, out, progress)
    for split in ("train", "val"):
        typer.echo(_line(Manifest.load(out / split)))


@app.command()
def pack(
    source: Annotated[
        Path, typer.Argument(help="folder of images (sub-folders: classes), or a CSV, JSONL or parquet table")
    ],
    out: Out,
    per_shard: Annotated[int, typer.Option(min=1, help="samples in a shard")] = 5000,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="don't mix the pictures")] = False,
    seed: Annotated[int, typer.Option(help="of the mixing")] = 0,
    path_column: Annotated[str | None, typer.Option(help="of a table: where its paths are")] = None,
    caption_column: Annotated[str | None, typer.Option(help="of a table: where its captions are")] = None,
    label_column: Annotated[str | None, typer.Option(help="of a table: where its labels are")] = None,
    classes: Annotated[Path | None, typer.Option(help="text file, a class name a line: their order")] = None,
    labels_as_names: Annotated[
        bool, typer.Option("--labels-as-names", help="of a table: number the labels anew, numbers too")
    ] = False,
    class_folders: Annotated[
        bool | None,
        typer.Option(
            "--class-folders/--no-class-folders",
            help="sub-folders are classes, or aren't [default: are, unless a downloader made them]",
        ),
    ] = None,
    sidecars: Annotated[
        bool, typer.Option(help="take .txt, .caption and .json files beside pictures, and a metadata table")
    ] = True,
    no_check: Annotated[bool, typer.Option("--no-check", help="don't decode every picture first")] = False,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="of a picture that is decoded [default: 100 million]")
    ] = None,
    skip_broken: Annotated[
        int, typer.Option(min=0, metavar="N", help="leave out up to N pictures that can't be packed")
    ] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="it is an error to leave anything out")] = False,
) -> None:
    """Pack images into shards and a manifest; an interrupted packing goes on where it stopped."""
    from data_pipeline import pack as packing
    from data_pipeline.classes import read_classes
    from data_pipeline.decode import MAX_PIXELS
    from data_pipeline.entries import SourceOptions
    from launch.progress import progress_bar

    columns, names = (path_column, caption_column, label_column), read_classes(classes) if classes else ()
    with progress_bar("pack") as progress:
        manifest = packing.pack(
            source,
            out,
            reading=SourceOptions(*columns, names, labels_as_names, class_folders, sidecars),
            per_shard=per_shard,
            processes=processes,
            shuffle_seed=None if keep_order else seed,
            check=not no_check,
            max_pixels=max_pixels or MAX_PIXELS,
            skip_broken=skip_broken,
            strict=strict,
            progress=progress,
        )
    for line in packing.account(manifest):
        typer.echo(f"note: {line}", err=True)
    typer.echo(_line(manifest))


@app.command()
def view(
    source: Annotated[str, typer.Argument(help="a run's config, or a manifest.json or its folder")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    out: Annotated[Path, typer.Option("--out", help="PNG to write")] = Path("contact_sheet.png"),
    count: Annotated[int, typer.Option(min=1, help="samples")] = 16,
    position: Annotated[int, typer.Option(min=0, help="samples consumed before the first one")] = 0,
) -> None:
    """Draw a contact sheet: raw pictures above what training makes of them, with key, class and caption."""
    from configs.loading import from_values, load
    from data_pipeline.types import RandomResizedCrop, ViewSpec
    from data_pipeline.view import SheetConfig, contact_sheet
    from pretrain.config import RunConfig

    config: SheetConfig | RunConfig
    if Path(source).is_dir() or source.endswith(".json"):
        config = from_values({"data": {"manifest": source}}, SheetConfig, overrides or (), source)
    else:
        config = load(source, RunConfig, overrides or ())
    size = config.data.image_size
    shape = (size, size) if isinstance(size, int) else size
    data, seed = config.data, config.run.seed
    views = [ViewSpec(shape, RandomResizedCrop())]
    if isinstance(config, RunConfig):
        views = list(config.views(shape))
    contact_sheet(data, views, out, seed=seed, position=position, count=count)
    typer.echo(f"{out}: {count} samples from position {position}")


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(help="tars: paths, folders, URLs, {000..123} braces, globs")],
    out: Out,
    classes: Annotated[Path | None, typer.Option(help="text file, a class name a line")] = None,
    picture_field: Annotated[
        list[str] | None, typer.Option(help="field with the picture, as image.jpg; may come several times")
    ] = None,
    label_field: Annotated[
        list[str] | None, typer.Option(help="field with the class number, as label.cls; likewise")
    ] = None,
    split_at: Annotated[
        Literal["first", "last"],
        typer.Option(help="dot of a member's name between key and field; webdataset: the first"),
    ] = "first",
    skip_broken: Annotated[int, typer.Option(min=0, help="bad shards that may be left out")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="nothing may be left out or look wrong; else no manifest")
    ] = False,
    processes: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Make a manifest for webdataset tars where they lie; an interrupted indexing goes on."""
    from data_pipeline import indexing
    from data_pipeline.account import Account, some
    from data_pipeline.classes import read_classes
    from launch.progress import progress_bar

    names = read_classes(classes) if classes else ()
    fields = indexing.Fields(_lower(picture_field), _lower(label_field), split_at)
    with progress_bar("index") as progress:
        manifest = indexing.index(
            shards,
            out,
            classes=names,
            fields=fields,
            processes=processes,
            skip_broken=skip_broken,
            strict=strict,
            progress=progress,
        )
    for line in Account.from_dict(manifest.about["indexed"]).lines(manifest.fields):
        typer.echo(f"note: {line}", err=True)
    typer.echo(_line(manifest))
    typer.echo(f"fields: {some(manifest.fields)}")


def _lower(names: list[str] | None) -> tuple[str, ...]:
    """Fields as they stand in an index: without the dot before them, in lower case, like webdataset's."""
    return tuple(name.removeprefix(".").lower() for name in names or ())


@app.command()
def verify(
    data: Set,
    fast: Annotated[bool, typer.Option("--fast", help="checksums only: don't decode the pictures")] = False,
    shared_keys: Annotated[
        bool, typer.Option("--shared-keys", help="shards may have keys in common, as merged downloads have")
    ] = False,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON on standard output")] = False,
) -> None:
    """Check every byte and picture of a set, remote shards too. Exit code 2 where something is wrong."""
    from data_pipeline.manifest import Manifest
    from data_pipeline.verify import verify as check
    from launch.progress import progress_bar

    with progress_bar("verify") as progress:
        report = check(
            Manifest.load(data),
            pictures=not fast,
            shared_keys=shared_keys,
            processes=processes,
            progress=progress,
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        for finding in report.findings[:100]:
            typer.echo(str(finding))
        if len(report.findings) > 100:
            typer.echo(f"... and {len(report.findings) - 100} more; --json lists them")
        for line in report.members.lines():
            typer.echo(f"note: {line}")
        wrong = len(report.findings) + report.more
        verdict = f"{wrong} things are wrong" if wrong else "all is well"
        typer.echo(f"{data}: {report.samples} samples in {report.shards} shards: {verdict}")
    raise typer.Exit(0 if report.whole else 2)


@app.command()
def stats(
    data: Set,
    look_at: Annotated[int, typer.Option(min=0, help="pictures to open")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output")] = False,
) -> None:
    """Count samples, bytes, picture sizes and labels."""
    import json
    from dataclasses import asdict

    from data_pipeline.manifest import Manifest
    from data_pipeline.stats import stats as count

    found = count(Manifest.load(data), look_at=look_at)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(f"{found.samples} samples, {found.shards} shards, {found.bytes / 1e6:.1f} MB")
    typer.echo(f"quantiles at 0, 5, 50, 95, 100 %; pictures and labels from {found.looked_at} samples")
    if found.unusable:
        typer.echo(f"{found.unusable} samples more can't be used: keel data verify says why", err=True)
    rows = [("samples a shard", found.shard_samples), ("height", found.heights), ("width", found.widths)]
    often = sorted(found.fields, key=lambda name: (-found.fields[name].samples, name))[:20]
    rows += [
        (f"{name}: bytes of {field.samples}", field.quantiles)
        for name, field in found.fields.items()
        if name in often
    ]
    for title, quantiles in rows:
        typer.echo(f"  {title:24}" + "".join(f"{value:>12}" for value in quantiles))
    if len(found.fields) > len(often):  # names with dots give thousands
        typer.echo(f"  and {len(found.fields) - len(often)} fields more; --json lists them")
    if found.labels:
        typer.echo("  labels: " + ", ".join(f"{name} {count}" for name, count in found.labels.items()))


@app.command()
def tokenizer(
    data: Set,
    to: Annotated[Path, typer.Option("--to", help="tokenizer.json to write")],
    vocab: Annotated[int, typer.Option(min=258, help="tokens at most")] = 49_408,
    captions: Annotated[
        list[str] | None, typer.Option(help="field with captions, or json.KEY; may come several times")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="samples to read at most")] = 10_000_000,
) -> None:
    """Make a byte-level BPE tokenizer from the captions of a set."""
    from data_pipeline.files import require_writable
    from data_pipeline.manifest import Manifest
    from data_pipeline.prepare import make_tokenizer
    from data_pipeline.tokenize import TokenizerConfig, open_tokenizer
    from launch.progress import progress_bar

    require_writable(to)  # reading the captions may take an hour
    with progress_bar("captions") as progress:
        make_tokenizer(
            Manifest.load(data), to, vocab, names=captions or ("txt",), limit=limit, progress=progress
        )
    made = open_tokenizer(TokenizerConfig(path=to.absolute()))
    typer.echo(f"{to}: {made.vocabulary} tokens, the end is {made.end}, hash {made.hash[:12]}")


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="run folder")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output")] = False,
) -> None:
    """Replay the order of a run's data up to where it is, and compare with the run's own counts."""
    import json
    from dataclasses import asdict

    from launch.progress import progress_bar
    from launch.runs.audit import audit_run

    with progress_bar("audit") as progress:
        found = audit_run(run, progress)
    if as_json:
        typer.echo(json.dumps([asdict(source) for source in found]))
        return
    columns = ("samples", "seen", "unique", "repeated", "substituted")
    typer.echo("".join(f"{name:>14}" for name in (*columns, "epochs")) + "  source")
    for source in found:
        counts = "".join(f"{getattr(source, name):>14}" for name in columns)
        typer.echo(f"{counts}{source.epochs:>14.3f}  {source.source}")


@app.command()
def bench(
    data: Set,
    size: Annotated[int, typer.Option(min=8, help="side of the view in pixels")] = 224,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=0)] = 2,
    seconds: Annotated[float, typer.Option(min=0.1)] = 10.0,
    cache: Annotated[Path | None, typer.Option(help="folder for shards behind URLs")] = None,
    gigabytes: Annotated[float, typer.Option(min=0.001, help="of the cache")] = 100.0,
) -> None:
    """Measure how fast this machine loads a set."""
    from data_pipeline.bench import throughput
    from data_pipeline.cache import CacheConfig

    kept = CacheConfig(directory=cache, gigabytes=gigabytes) if cache else None
    found = throughput(data, size=size, batch_size=batch_size, workers=workers, seconds=seconds, cache=kept)
    typer.echo(
        f"{found.samples_per_second:.0f} samples/s with {workers} workers, {found.cpu_ms:.2f} CPU ms "
        f"a sample, first batch after {found.first_batch:.2f} s; {found.samples} samples were read"
    )


def _line(manifest: Manifest) -> str:
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    return (
        f"{manifest.path}: {manifest.samples} samples in {len(manifest.shards)} shards{classes}, "
        f"{manifest.bytes / 1e6:.1f} MB, hash {manifest.hash[:12]}"
    )
