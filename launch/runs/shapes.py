"""What the files of a run hold, held against what they should: a value of another shape counts for nothing.

Whoever lists a thousand runs must not fail at one that was edited by hand, torn, or written by another
version. What was found instead is told, so that the row of that run can say it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

STATUSES = ("new", "running", "done", "stopped", "failed")
"""What run.json's `status` may be."""


def number(value: Any) -> float | None:
    """A JSON number as a float, NaN and infinities included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def count(value: Any) -> int | None:
    """A JSON number that counts something, such as steps; None for anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return int(value) if whole else None


def finite(value: float | None) -> bool:
    """Whether there is a value, and one that can be compared."""
    return value is not None and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _job_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value) is not None


def _attempts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _cluster(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("executor", ""), str)


def _known(value: Any) -> bool:
    return value in STATUSES


_Fields = Mapping[str, tuple[Callable[[Any], bool], str]]
_COUNT = (lambda value: count(value) is not None, "a whole number")
_NUMBER = (lambda value: number(value) is not None, "a number")
_TEXT = (_text, "a text")
_RUN: _Fields = {
    "status": (_known, f"one of {', '.join(STATUSES)}"), "heartbeat": _TEXT, "step": _COUNT,
    "total_steps": _COUNT, "attempts": (_attempts, "a list of objects"), "error": _TEXT, "host": _TEXT,
}  # fmt: skip
_JOB: _Fields = {
    "job_id": (_job_id, "a job's id"), "cluster": (_cluster, "an object"), "log_folder": _TEXT, "code": _TEXT,
    "history": (_texts, "a list of texts"), "cancelled": _TEXT, "site": _TEXT, "name": _TEXT,
}  # fmt: skip
_METRICS: _Fields = {"step": _COUNT, "loss": _NUMBER, "seconds": _NUMBER, "samples_per_second": _NUMBER}
_EVALUATION: _Fields = {
    "step": _COUNT, "name": _TEXT, "values": (lambda value: isinstance(value, dict), "an object"),
}  # fmt: skip
_EMPTY_WITHOUT = {"heartbeat", "error", "host", "cancelled", "site", "name", "loss", "samples_per_second"}
"""Fields that may be null."""


def run_state(found: Row) -> tuple[Row, list[str]]:
    """run.json without what can't be used, and what that was."""
    return _checked(found, _RUN, "run.json")


def submission(found: Row) -> tuple[Row, list[str]]:
    """slurm.json without what can't be used, and what that was."""
    return _checked(found, _JOB, "slurm.json")


def metrics(rows: Sequence[Any]) -> tuple[list[Row], list[str]]:
    """Rows of metrics.jsonl that have a step, without what can't be used, and what that was."""
    return _rows(rows, _METRICS, ("step",), "metrics.jsonl")


def evaluations(rows: Sequence[Any]) -> tuple[list[Row], list[str]]:
    """Rows of evaluations.jsonl that say which, when and what; and what the others were."""
    return _rows(rows, _EVALUATION, ("step", "name", "values"), "evaluations.jsonl")


def _rows(
    rows: Sequence[Any], fields: _Fields, needed: Sequence[str], file: str
) -> tuple[list[Row], list[str]]:
    kept: list[Row] = []
    wrong: list[str] = []
    for row in rows:
        if not isinstance(row, dict):
            wrong.append(f"{file}: a row holds {_shown(row)}, not an object")
            continue
        checked, problems = _checked(row, fields, file)
        missing = [name for name in needed if name not in checked]
        if missing and not problems:
            problems = [f"{file}: a row has no {missing[0]}"]
        wrong += problems
        if not missing:
            kept.append(checked)
    return kept, wrong


def _checked(found: Row, fields: _Fields, file: str) -> tuple[Row, list[str]]:
    wrong = {
        name: f"{file}: {name} holds {_shown(found[name])}, not {what}"
        for name, (fits, what) in fields.items()
        if name in found and not (found[name] is None and name in _EMPTY_WITHOUT) and not fits(found[name])
    }
    return ({k: v for k, v in found.items() if k not in wrong} if wrong else found), list(wrong.values())


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value) if isinstance(value, int | float) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
