"""`keel evaluate`: judge a trained encoder, by the run's own evaluations or by one from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError
from configs.loading import validate
from pretrain import encoders, trained
from pretrain.evaluators import EvaluatorConfig, evaluator_config_type, kinds
from pretrain.evaluators.subject import Subject
from pretrain.trained import Trained
from pretrain.types import Scores


def evaluate(run: Path, settings: Sequence[str], step: int | None) -> list[Scores]:
    """Scores of the newest valid checkpoint of `run`, or of the one at `step`. Raises `UserError`."""
    model = trained.read(run, step)
    evaluations = [chosen(settings)] if settings else model.config.evaluate
    if not evaluations:
        raise ConfigError(
            f"{run}: its config has no `evaluate`; name one, such as kind=knn data=MANIFEST "
            f"(kinds: {', '.join(kinds())})"
        )
    subject = subject_of(model)
    return [evaluation.build()(subject) for evaluation in evaluations]


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


def subject_of(model: Trained) -> Subject:
    """The trained encoder as evaluators see it; with its pretext task where the training data are here."""
    objective = trained.read_objective(model) if model.config.data.manifest.is_file() else None
    encoder = objective.encoder if objective else model.encoder
    return Subject(
        encoder=encoder,
        encode=partial(encoders.features, encoder, pooling=model.config.encoder.pooling),
        view=model.view,
        device=torch.device("cpu"),
        objective=objective,
    )


def show(scores: Sequence[Scores], *, as_json: bool) -> None:
    """Print scores as a table, or as one JSON list."""
    if as_json:
        print(
            json.dumps(
                [{"name": s.kind, "values": dict(s.values), "details": dict(s.details)} for s in scores]
            )
        )
        return
    table = Table("evaluation", "figure", "value")
    for score in scores:
        for name, value in score.values.items():
            table.add_row(score.kind, name, f"{value:.4g}")
    Console().print(table)
