"""The whole of keel in some minutes: three objectives trained, judged in one table, exported and reopened.

What `make demo` and `keel demo` run. Running it again keeps what is finished and goes on with the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from configs.loading import load
from launch.demo.findings import NAMES, Findings, judge, table
from launch.demo.pictures import draw
from launch.progress import progress_bar
from launch.ranks.local import launch
from pretrain.config import RunConfig
from pretrain.export.timm_folder import ExportResult, export
from pretrain.run import trained
from pretrain.run.folder import RunFolder
from pretrain.run.main import prepare

CONFIGS = ("demo/mae", "demo/moco", "demo/clip")


@dataclass(frozen=True)
class Part:
    """One finished run of the demo."""

    folder: RunFolder
    findings: Findings
    picture: Path
    exported: ExportResult


def run(
    directory: Path = Path("runs/demo"),
    *,
    configs: Sequence[str] = CONFIGS,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
    console: Console | None = None,
) -> int:
    """Run the demo into `directory` and print where everything lies; gives the exit code.

    `nproc`: ranks; by default two, or as many as there are GPUs where there is only one.
    """
    began = time.monotonic()
    console = console or Console()
    nproc = nproc or (min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2)
    folders = []
    for config in configs:
        settings = load(config, RunConfig, [*own_settings(config, directory), *overrides])
        with progress_bar("making data") as progress:
            folder = prepare(settings, world_size=nproc, progress=progress)
        name = NAMES.get(settings.objective.name, settings.objective.name)
        if folder.read_state().get("status") == "done":
            console.print(
                f"{folder.root.name} is trained already; remove {from_here(folder.root)} to train it again"
            )
        else:
            console.print(f"training a small {name} with {nproc} process{'es' * (nproc > 1)}")
            code = launch(folder, nproc, apart=True)
            if code:
                return code
        folders.append(folder)
    report([finish(folder, console) for folder in folders], console)
    console.print(f"{time.monotonic() - began:.0f} seconds in all")
    return 0


def own_settings(config: str, directory: Path) -> list[str]:
    """Overrides that put a config's run beside the others, on shared data, judged at the end."""
    settings = load(config, RunConfig)
    assert settings.data.demo is not None
    data = directory / "data" / settings.data.demo.name
    placed = [
        f"run.dir={directory / settings.objective.name}",
        f"data.manifest={data}/train/manifest.json",
        "evaluate=[]",
    ]
    if settings.data.tokenizer is not None:
        placed.append(f"data.tokenizer.path={data}/tokenizer.json")
    return placed


def finish(folder: RunFolder, console: Console) -> Part:
    """Evaluate, draw and export a trained run."""
    # These networks are too small to share, and waiting threads would slow them down.
    torch.set_num_threads(1)
    with console.status(f"{folder.root.name}: judging, drawing, exporting, reopening in a fresh process"):
        model = trained.read(folder.root)
        findings = judge(model)
        (folder.root / "demo.json").write_text(json.dumps(asdict(findings), indent=1) + "\n")
        picture = draw(model, folder.pictures)
        exported = export(folder.root, folder.exports / "timm", force=True, licence="apache-2.0")
    return Part(folder, findings, picture, exported)


def report(parts: Sequence[Part], console: Console) -> None:
    """Print what was found and where it lies."""

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    show_table([part.findings for part in parts], console)
    for part in parts:
        if part.findings.reconstruction:
            errors = ", ".join(f"{name} {error:.3f}" for name, error in part.findings.reconstruction.items())
            say(f"error on hidden patches: {errors}")
    worst = max(part.exported.max_difference for part in parts)
    say(f"exports reopened by timm in fresh processes: largest difference {worst:.1e}\n")
    for part in parts:
        say(f"{part.folder.root.name:9}{from_here(part.folder.root)}")
        say(f"  picture  {from_here(part.picture)}")
        say(f"  backbone {from_here(part.exported.folder)}")
    say(f'\ntimm.create_model("local-dir:{from_here(parts[-1].exported.folder)}", pretrained=True)')


def show_table(findings: Sequence[Findings], console: Console) -> None:
    """Whole also where a terminal, or what rich takes a log for, is narrower: it wraps, and loses nothing."""
    found = table(findings)
    natural = console.measure(found, options=console.options.update(max_width=1000)).maximum
    if natural > console.width:
        console = Console(file=console.file, width=natural)
    console.print(found)


def from_here(place: Path) -> Path:
    """As one would type it: relative where it lies under the working directory."""
    here = Path.cwd()
    return place.relative_to(here) if place.is_relative_to(here) else place
