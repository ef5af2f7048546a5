"""The whole of keel in two minutes: digits to shards, a small MAE, its evaluation, an export that timm opens.

What `make demo` and `keel demo` run. Running it again keeps what is finished and goes on with the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from configs.loading import load
from data_pipeline.types import Batch
from launch.local import launch
from launch.progress import progress_bar
from pretrain import encoders, trained
from pretrain.config import RunConfig
from pretrain.evaluators.few_shot import FewShotConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.evaluators.subject import RawPixels, Subject, mean_over_set
from pretrain.export import ExportResult, export
from pretrain.folder import RunFolder
from pretrain.losses import masked_patch_loss
from pretrain.objectives.mae import MAE
from pretrain.run import prepare
from pretrain.trained import Trained

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """Frozen features judged by few labels and by neighbours: top-1 accuracy in percent."""

    features: str
    few_shot: Mapping[int, float]  # labels a class -> mean over draws
    knn: float


@dataclass(frozen=True)
class Findings:
    """All that the demo measures, on images the model never saw."""

    rows: Sequence[Row]
    reconstruction: Mapping[str, float]  # mean squared error on hidden patches, by what predicted them


def run(
    directory: Path = Path("runs/demo"),
    *,
    config: str = "demo/mae",
    overrides: Sequence[str] = (),
    nproc: int = 2,
    console: Console | None = None,
) -> int:
    """Run the demo into `directory` and print where everything lies; gives the training's exit code."""
    began = time.monotonic()
    console = console or Console()
    settings = load(config, RunConfig, [f"run.dir={directory}", *overrides])
    with progress_bar("packing digits") as progress:
        folder = prepare(settings, world_size=nproc, progress=progress)
    if folder.read_state().get("status") == "done":
        console.print(f"{directory} is trained already; remove it to train again")
    else:
        console.print(f"training a small MAE with {nproc} processes: about two minutes on two cores")
        code = launch(folder, nproc)
        if code:
            return code
    findings, result = finish(folder, console)
    report(findings, result, folder, console)
    console.print(f"{time.monotonic() - began:.0f} seconds in all")
    return 0


def finish(folder: RunFolder, console: Console) -> tuple[Findings, ExportResult]:
    """Evaluate, draw and export a trained run, with progress bars."""
    torch.set_num_threads(
        1
    )  # these networks are too small to share, and waiting threads would slow them down
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        model = trained.read(folder.root)
        findings = judge(model, bar)
        (folder.root / "demo.json").write_text(json.dumps(asdict(findings), indent=1) + "\n")
        draw(model, folder.pictures / "reconstructions.png")
        task = bar.add_task("exporting, reopening in a fresh process", total=1)
        result = export(folder.root, folder.exports / "timm", force=True, licence="apache-2.0")
        bar.advance(task)
    return findings, result


def judge(model: Trained, bar: Progress | None = None) -> Findings:
    """Raw pixels, the untrained and the pretrained encoder judged alike; then the reconstruction."""
    pooling = model.config.encoder.pooling
    pretrained, fresh = trained.read_objective(model), trained.new_objective(model.config)
    subjects = {"raw pixels": Subject(pixels := RawPixels(), pixels, model.view, CPU)}
    for name, objective in (("untrained encoder", fresh), ("pretrained encoder", pretrained)):
        encode = partial(encoders.features, objective.encoder, pooling=pooling)
        subjects[name] = Subject(objective.encoder, encode, model.view, CPU, objective)
    rows = []
    for name, subject in subjects.items():
        task = bar.add_task(f"evaluating: {name}", total=1) if bar else None
        rows.append(row(name, subject, model.config.data.first_manifest))
        if bar and task is not None:
            bar.advance(task)
    return Findings(
        rows, reconstruction_errors(subjects["pretrained encoder"], model.config.data.first_manifest)
    )


def row(name: str, subject: Subject, manifest: Path) -> Row:
    """Few-shot probe and kNN, learning from `manifest` and judged on the validation set beside it."""
    val = validation(manifest)
    probe = FewShotConfig(data=val, labelled=manifest)
    few_shot = probe.build()(subject).values
    knn = KNNConfig(data=val, labelled=manifest).build()(subject).values["top1"]
    return Row(name, {shots: few_shot[f"top1_at_{shots}"] for shots in probe.shots}, knn)


def validation(manifest: Path) -> Path:
    """The manifest of the demo set's other part."""
    return manifest.parent.parent / "val" / manifest.name


def reconstruction_errors(subject: Subject, manifest: Path) -> dict[str, float]:
    """Mean squared error on hidden patches of unseen images, in units of the normalised pixels.

    Against two guesses that need no network: the mean patch, and the mean training image at the same place.
    """
    objective, val = subject.objective, validation(manifest)
    assert isinstance(objective, MAE)
    total, count = torch.zeros(()), 0
    with subject.looking():
        for batch in subject.batches(manifest):
            total = total + objective.reconstruct(batch).target.sum(dim=0)
            count += len(batch)
    mean_image = total / count

    def from_mean_image(batch: Batch) -> dict[str, Tensor]:
        _, target, masked = objective.reconstruct(batch)
        return {"mean training image": masked_patch_loss(mean_image.expand_as(target), target, masked)}

    own = mean_over_set(subject, val, objective.judge)
    return {
        "pretrained MAE": own["reconstruction_error"],
        **mean_over_set(subject, val, from_mean_image),
        "mean patch": own["mean_patch_error"],
    }


def draw(model: Trained, to: Path, enlarge: int = 4) -> None:
    """Unseen images, half of each hidden, and what the model makes of it: one PNG."""
    objective = trained.read_objective(model)
    subject = Subject(objective.encoder, objective.encoder, model.view, CPU, objective, batch_size=8)
    with subject.looking():
        batch = next(iter(subject.batches(validation(model.config.data.first_manifest))))
        sheet = objective.pictures(batch)["reconstructions"]
    strips = torch.stack(sheet.chunk(len(batch), dim=1))  # one for each image: (8, 3, H, 3 * W)
    edge = 4
    framed = torch.nn.functional.pad(strips, (edge, edge, edge, edge), value=1.0)
    columns = torch.cat([torch.cat(list(half), dim=1) for half in framed.chunk(2)], dim=2)
    picture = Image.fromarray((columns * 255).round().byte().permute(1, 2, 0).numpy())
    to.parent.mkdir(exist_ok=True)
    picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST).save(to)


def report(findings: Findings, result: ExportResult, folder: RunFolder, console: Console) -> None:
    """Print what was found and where it lies."""
    console.print(table(findings))
    errors = ", ".join(f"{name} {error:.3f}" for name, error in findings.reconstruction.items())
    console.print(f"error on hidden patches: {errors}", highlight=False, soft_wrap=True)
    reopened = f"export reopened by timm in a fresh process: largest difference {result.max_difference:.1e}"
    console.print(reopened + "\n", highlight=False, soft_wrap=True)
    places = {
        "run": folder.root, "metrics": folder.metrics_file,
        "pictures": folder.pictures / "reconstructions.png", "backbone": result.folder,
    }  # fmt: skip
    for name, place in places.items():
        console.print(f"{name:9}{from_here(place)}", soft_wrap=True, highlight=False)
    opened = f'timm.create_model("local-dir:{from_here(result.folder)}", pretrained=True)'
    console.print(f"\n{opened}", soft_wrap=True)


def from_here(place: Path) -> Path:
    """As one would type it: relative where it lies under the working directory."""
    here = Path.cwd()
    return place.relative_to(here) if place.is_relative_to(here) else place


def table(findings: Findings) -> Table:
    """Features down, evaluations across."""
    shots = list(findings.rows[0].few_shot)
    title = "top-1 % on unseen digits, by labels a class and by neighbours"
    table = Table(title=title, title_justify="left", title_style="", min_width=len(title))
    table.add_column("")
    for count in shots:
        table.add_column(f"{count} label" + "s" * (count > 1), justify="right")
    table.add_column("kNN", justify="right")
    for found in findings.rows:
        table.add_row(found.features, *(f"{found.few_shot[n]:.1f}" for n in shots), f"{found.knn:.1f}")
    return table
