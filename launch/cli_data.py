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
        Path, typer.Argument(help="folder of images (sub-folders: classes) or CSV/JSONL table")
    ],
    out: Out,
    per_shard: Annotated[int, typer.Option(min=1, help="samples in a shard")] = 5000,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="don't mix the pictures")] = False,
    seed: Annotated[int, typer.Option(help="of the mixing")] = 0,
    no_check: Annotated[bool, typer.Option("--no-check", help="don't decode every picture first")] = False,
) -> None:
    """Pack images into shards and a manifest; an interrupted packing goes on where it stopped."""
    from data_pipeline import pack as packing
    from launch.progress import progress_bar

    with progress_bar("pack") as progress:
        manifest = packing.pack(
            source,
            out,
            per_shard=per_shard,
            processes=processes,
            shuffle_seed=None if keep_order else seed,
            check=not no_check,
            progress=progress,
        )
    typer.echo(_line(manifest))


@app.command()
def view(
    source: Annotated[str, typer.Argument(help="a run's config, or a manifest.json or its folder")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    out: Annotated[Path, typer.Option("--out", help="PNG to write")] = Path("contact_sheet.png"),
    count: Annotated[int, typer.Option(min=1, help="samples")] = 16,
    position: Annotated[int, typer.Option(min=0, help="samples consumed before the first one")] = 0,
) -> None:
    """Draw a contact sheet: raw pictures beside what training makes of them."""
    from configs.loading import load
    from data_pipeline.load import DataConfig
    from data_pipeline.types import RandomResizedCrop, ViewSpec
    from data_pipeline.view import contact_sheet
    from pretrain.config import RunConfig

    if Path(source).is_dir() or source.endswith(".json"):
        data, seed, views = DataConfig(manifest=Path(source)), 0, [ViewSpec((224, 224), RandomResizedCrop())]
    else:
        config = load(source, RunConfig, overrides or ())
        size = config.data.image_size
        shape = (size, size) if isinstance(size, int) else size
        data, seed, views = config.data, config.run.seed, list(config.objective.views(shape))
    contact_sheet(data, views, out, seed=seed, position=position, count=count)
    typer.echo(f"{out}: {count} samples from position {position}")


def _line(manifest: Manifest) -> str:
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    return (
        f"{manifest.path}: {manifest.samples} samples in {len(manifest.shards)} shards{classes}, "
        f"{manifest.bytes / 1e6:.1f} MB, hash {manifest.hash[:12]}"
    )
