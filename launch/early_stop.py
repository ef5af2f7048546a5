"""Members of a sweep that give themselves up: no daemon, nobody has to watch.

Rank 0 of each member looks at its own metrics while it trains. When a rung is behind it, its value there goes
into RUN/early_stop.json, is held against what the other members have written there so far, and where the rule
says so the run is asked to stop: as by a signal, it saves and leaves, with reason "early_stop". That is
asynchronous successive halving in its stopping form; it needs the members' folders to be seen from all nodes.

A rung is decided once. A member that is resumed by hand is not stopped at a rung it was stopped at before.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.sweep import EarlyStop
from launch.registry import lower_is_better, scores
from launch.run_files import read_json, tail

if TYPE_CHECKING:
    from pretrain.health import StopRequest

SWEEP = "sweep.json"
"""Beside the members: the sweep as it was submitted."""

DECISIONS = "early_stop.json"
"""In each member: {"rungs": {"0.25": {"value": ..., "stopped": ..., "others": ...}}}."""

POLL = 2.0
"""Seconds between two looks of a member at its own metrics."""

SPAN = 0.2
"""Part of the way to a rung over which a noisy figure is averaged."""


@contextmanager
def watching(run: Path, stop: StopRequest, rank: int = 0) -> Iterator[None]:
    """Meanwhile, where `run` is a member of a sweep that stops early, look at its rungs and ask `stop`.

    Rank 0 does, and the others hear of it as of a signal that only one of them got.
    """
    rule = rule_of(run.parent) if rank == 0 else None
    if rule is None:
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, rule, stop, ended), name="early-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def rule_of(sweep: Path) -> EarlyStop | None:
    """The rule of the sweep in this folder, None where it is none or trains all to their ends."""
    found = read_json(sweep / SWEEP).get("early_stop")
    return EarlyStop.model_validate(found) if found else None


def _watch(run: Path, rule: EarlyStop, stop: StopRequest, ended: threading.Event) -> None:
    try:
        while not ended.wait(POLL):
            if look(run, rule):
                print("early_stop: others are better at this rung; saving, then leaving", file=sys.stderr)
                stop.ask("early_stop")
                return
    except Exception as error:  # a sweep's comfort must not cost a training
        print(f"early_stop: can't be decided, so training goes on: {error!r}", file=sys.stderr)


def look(run: Path, rule: EarlyStop) -> bool:
    """Decide the rungs that are behind this run and still open; whether it is to stop at one of them."""
    from pretrain.folder import write_atomically

    decided: dict[str, Any] = dict(read_json(run / DECISIONS).get("rungs", {}))
    total, last = read_json(run / "run.json").get("total_steps"), tail(run / "metrics.jsonl", last=1)
    if not total or not last:
        return False
    for rung in rule.rungs:
        step = math.ceil(rung * total)
        if str(rung) in decided or last[-1]["step"] <= step:
            continue
        value = value_at(run, rule.metric, step)
        if value is None:
            continue
        others = values_of_others(run, rung)
        stops = worse(rule, value, others)
        decided[str(rung)] = {"value": value, "stopped": stops, "others": len(others), "metric": rule.metric}
        write_atomically(run / DECISIONS, json.dumps({"rungs": decided}, indent=1) + "\n")
        if stops:
            return True
    return False


def value_at(run: Path, metric: str, step: int) -> float | None:
    """The newest score up to `step`; of a figure in metrics.jsonl, its mean over the last fifth of the way.

    None where there is no such figure yet.
    """
    found = scores(tail(run / "evaluations.jsonl", size=1 << 24), metric)
    judged = [score.value for score in found if score.step <= step]
    if judged:
        return judged[-1]
    rows = [row for row in tail(run / "metrics.jsonl", size=1 << 30) if row["step"] <= step]
    near = [row for row in rows if row["step"] > (1 - SPAN) * step] or rows[-1:]
    values = [row[metric] for row in near if isinstance(row.get(metric), int | float)]
    return statistics.fmean(values) if values else None


def values_of_others(run: Path, rung: float) -> list[float]:
    """What the other members of the sweep have written of this rung so far."""
    found = (
        read_json(path).get("rungs", {}).get(str(rung))
        for path in run.parent.glob(f"*/{DECISIONS}")
        if path.parent != run
    )
    return [float(decision["value"]) for decision in found if decision]


def worse(rule: EarlyStop, value: float, others: Sequence[float]) -> bool:
    """Whether a member with `value` at a rung is to stop there, given the others' values so far."""
    sign = 1.0 if lower_is_better(rule.metric) else -1.0
    if math.isnan(value):
        return True
    # A NaN has no place in an order: who has diverged is the worst of all.
    own = sign * value
    rest = sorted(math.inf if math.isnan(other) else sign * other for other in others)
    if rule.rule == "median":
        return len(rest) >= rule.least and own > statistics.median(rest)
    allowed = math.ceil((len(rest) + 1) / rule.reduction)  # of all that came so far, this one included
    return sum(other < own for other in rest) >= allowed
