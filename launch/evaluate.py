"""`keel evaluate`: which evaluations were asked for, and how their scores are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError
from configs.loading import load, validate
from launch.progress import progress_bar
from pretrain.config import RunConfig
from pretrain.evaluate import evaluate as judge
from pretrain.evaluators import EvaluatorConfig, evaluator_config_type, kinds
from pretrain.evaluators.sheets import image_of
from pretrain.folder import RunFolder
from pretrain.types import Scores


def evaluate(source: str, settings: Sequence[str], step: int | None) -> list[Scores]:
    """Scores of a run, an export or a timm model: by `settings`, else by the run's own evaluations."""
    evaluations = [chosen(settings)] if settings else own_evaluations(source)
    with progress_bar("encoding") as progress:
        return judge(source, evaluations, step=step, progress=progress)


def own_evaluations(source: str) -> Sequence[EvaluatorConfig]:
    """What the config of a run evaluates. Raises `ConfigError` where that is nothing, or there is no run."""
    folder = RunFolder(Path(source))
    found = load(folder.config_file, RunConfig).evaluate if folder.exists() else ()
    if not found:
        raise ConfigError(
            f"{source}: has no evaluations of its own; name one, such as kind=knn data=MANIFEST "
            f"(kinds: {', '.join(kinds())})"
        )
    return found


def chosen(settings: Sequence[str]) -> EvaluatorConfig:
    """An evaluation from `name=value` settings. Raises `ConfigError`."""
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting}: a setting reads name=value, such as kind=knn")
        values[name] = yaml.safe_load(value)
    try:
        schema = evaluator_config_type(str(values.get("kind")))
    except ValueError as error:
        raise ConfigError(f"kind: found {values.get('kind')!r}; {error}") from None
    return validate(values, schema, source="evaluate").placed()


def show(scores: Sequence[Scores], *, as_json: bool) -> None:
    """Print scores as a table, or as one JSON list."""
    if as_json:
        rows = [{"name": s.kind, "values": dict(s.values), "details": dict(s.details)} for s in scores]
        print(json.dumps(rows))
        return
    if any(score.values for score in scores):
        _table(scores)


def save_pictures(source: str, scores: Sequence[Scores]) -> list[Path]:
    """Write what was drawn to RUN/pictures, of another source to ./pictures; gives the files."""
    folder = RunFolder(Path(source)).pictures if RunFolder(Path(source)).exists() else Path("pictures")
    written = []
    for score in scores:
        for name, picture in score.pictures.items():
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{score.kind}-{name}.png")
            image_of(picture).save(written[-1])
    return written


def _table(scores: Sequence[Scores]) -> None:
    table = Table("evaluation", "figure", "value")
    for score in scores:
        for name, value in score.values.items():
            table.add_row(score.kind, name, f"{value:.4g}")
    Console().print(table)
