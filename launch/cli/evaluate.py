"""`keel evaluate`: which evaluations were asked for, and how their scores are shown."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError, RunError
from configs.loading import load, validate
from data_pipeline.files import write_whole
from launch.progress import progress_bar
from pretrain.config import RunConfig
from pretrain.evaluators import EvaluatorConfig, evaluator_config_type, kinds
from pretrain.export.subject import opener
from pretrain.judging.evaluate import evaluate as judge
from pretrain.judging.schedule import jsonable
from pretrain.judging.sheets import image_of
from pretrain.ports import Scores
from pretrain.run.folder import RunFolder

MOST_WORKERS = 8


def evaluate(
    sources: Sequence[str],
    evaluations: Sequence[EvaluatorConfig],
    step: int | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
) -> dict[str, list[Scores]]:
    """Scores of runs, exports and timm models; `step` is of the first, the others' is their newest.

    `device`: auto, cpu or cuda. `workers`: processes that decode, None: as many as there are processors, at
    most `MOST_WORKERS`. Raises `UserError`.
    """
    where = device_named(device)
    if workers is None:
        workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    found = {}
    for number, source in enumerate(sources):
        with progress_bar(f"encoding {source}" if number else "encoding") as progress:
            found[source] = judge(
                opener(source, step=None if number else step), evaluations, device=where, workers=workers,
                progress=progress,
            )  # fmt: skip
    return found


def device_named(name: str) -> torch.device:
    """auto: a GPU where there is one. Raises `ConfigError` where `name` asks for one that isn't there."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("--device: found cuda, but there is no GPU here; use auto or cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def wanted(
    source: str, settings: Sequence[str], kinds: Sequence[str] = (), data: Path | None = None
) -> Sequence[EvaluatorConfig]:
    """One evaluation for each of `kinds` with these settings, else by `settings`, else the run's own.

    Raises `ConfigError`.
    """
    if data is not None:
        settings = [f"data={json.dumps(str(data))}", *settings]
    if kinds:
        return [chosen([f"kind={kind}", *settings]) for kind in kinds]
    return [chosen(settings)] if settings else own_evaluations(source)


def own_evaluations(source: str) -> Sequence[EvaluatorConfig]:
    """What the config of a run evaluates. Raises `ConfigError` where that is nothing, or there is no run."""
    folder = RunFolder(Path(source))
    found = load(folder.config_file, RunConfig).evaluate if folder.exists() else ()
    if not found:
        raise ConfigError(
            f"{source}: has no evaluations of its own; name one, such as --kind knn --data MANIFEST "
            f"(kinds: {', '.join(kinds())})"
        )
    return found


def chosen(settings: Sequence[str]) -> EvaluatorConfig:
    """An evaluation from `name=value` settings. Raises `ConfigError`."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting}: a setting reads name=value, such as kind=knn")
        if name in values:
            raise ConfigError(f"{name}: is given twice, as {values[name]} and as {value}; give it once")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{name}: found {value!r}, which isn't a value; put it in quotes") from None
    try:
        schema = evaluator_config_type(str(values.get("kind")))
    except ValueError as error:
        raise ConfigError(f"kind: found {values.get('kind')!r}; {error}") from None
    return validate(values, schema, source="evaluate").placed()


def show(found: Mapping[str, Sequence[Scores]], *, as_json: bool) -> None:
    """Print the scores of each source as one table, or as one JSON list."""
    if as_json:
        rows = [
            {"source": source, "name": s.kind, "values": jsonable(s.values), "details": dict(s.details)}
            for source, scores in found.items()
            for s in scores
        ]
        print(json.dumps(rows, allow_nan=False))
        return
    if any(score.values for scores in found.values() for score in scores):
        _table(found)


def save_pictures(source: str, scores: Sequence[Scores]) -> list[Path]:
    """Write what was drawn to RUN/pictures, of another source to ./pictures; gives the files.

    Raises `RunError` where they can't be written.
    """
    folder = RunFolder(Path(source)).pictures if RunFolder(Path(source)).exists() else Path("pictures")
    written = []
    for score in scores:
        for name, picture in score.pictures.items():
            file, png = folder / f"{score.kind}-{name}.png", io.BytesIO()
            image_of(picture).save(png, "PNG")
            try:
                write_whole(file, png.getvalue())
            except OSError as error:
                raise RunError(
                    f"{file}: can't be written: {error.strerror}; make room, or let the folder be written to"
                ) from error
            written.append(file)
    return written


def _table(found: Mapping[str, Sequence[Scores]]) -> None:
    """A row for each figure, a column for each source: all are judged alike."""
    table = Table("evaluation", "figure", *(found if len(found) > 1 else ["value"]))
    for scores in zip(*found.values(), strict=True):
        for name in scores[0].values:
            table.add_row(scores[0].kind, name, *(f"{score.values[name]:.4g}" for score in scores))
    Console().print(table)
