"""`keel data audit`: what a run says it has read, held against the order of its data."""

from __future__ import annotations

import json
from pathlib import Path

from configs.errors import RunError
from configs.loading import load
from data_pipeline.audit import SourceAudit, audit
from data_pipeline.facts import facts_of
from data_pipeline.parallel import Progress
from data_pipeline.quarantine import quarantined
from pretrain.config import RunConfig


def audit_run(run: Path, progress: Progress | None = None) -> list[SourceAudit]:
    """Replay the order of RUN up to its last metrics row. Raises `RunError` where the counts differ."""
    if not (run / "config.yaml").is_file():
        raise RunError(f"{run}: not a run folder: it has no config.yaml")
    config = load(run / "config.yaml", RunConfig)
    row = _last_row(run / "metrics.jsonl")
    facts = facts_of(config.data.model_copy(update={"tokenizer": None}))
    if config.data.stream is not None:
        raise RunError(f"{run}: was trained on data.stream, which has no order that could be replayed")
    plan = facts.plan(config.run.seed)
    names = [str(manifest.path) for manifest in facts.manifests]
    found = audit(plan, names, int(row["samples"]), quarantined(run / "quarantine.jsonl"), progress)
    for number, source in enumerate(found):
        counted = row.get(f"data/source_{number}_samples")
        if counted is not None and counted != source.seen:
            raise RunError(
                f"{run / 'metrics.jsonl'}: data/source_{number}_samples: found {counted:g}, but the order "
                f"of the data gives {source.seen} at {row['samples']:g} samples: data or metrics were changed"
            )
    return found


def _last_row(path: Path) -> dict[str, float]:
    """The last whole line of metrics.jsonl; a run that was killed may have cut one."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise RunError(f"{path}: no metrics yet: the run hasn't taken a step") from None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "samples" in row:
            return row
    raise RunError(f"{path}: no metrics yet: the run hasn't taken a step")
