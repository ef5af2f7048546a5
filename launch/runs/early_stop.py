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
from launch.runs.figures import Figures
from launch.runs.files import read_json, tail
from launch.runs.registry import lower_is_better
from launch.runs.shapes import count, finite, metrics, number

if TYPE_CHECKING:
    from pretrain.health.stopping import StopRequest

SWEEP = "sweep.json"
"""Beside the members: the sweep as it was submitted."""

DECISIONS = "early_stop.json"
"""In each member: {"rungs": {"0.25": {"value": ..., "stopped": ..., "others": ...}}}."""

POLL = 2.0
"""Seconds between two looks of a member at its own metrics."""


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
        rungs = Rungs(run, rule)
        while not ended.wait(POLL):
            if rungs.stops():
                print("early_stop: others are better at this rung; saving, then leaving", file=sys.stderr)
                stop.ask("early_stop")
                return
    except Exception as error:  # a sweep's comfort must not cost a training
        print(f"early_stop: can't be decided, so training goes on: {error!r}", file=sys.stderr)


class Rungs:
    """The rungs of one member. Each look reads only what its files have grown by."""

    def __init__(self, run: Path, rule: EarlyStop) -> None:
        self.run, self.rule, self.figures = run, rule, Figures(run, rule.metric)

    def stops(self) -> bool:
        """Decide the rungs that are behind this run and still open; whether it is to stop at one of them."""
        from data_pipeline.files import write_atomically

        run, rule = self.run, self.rule
        decided = decisions(run / DECISIONS)
        total = count(read_json(run / "run.json").get("total_steps"))
        last, _ = metrics(tail(run / "metrics.jsonl", last=1))
        if not total or not last:
            return False
        behind = {rung: math.ceil(rung * total) for rung in rule.rungs if str(rung) not in decided}
        behind = {rung: step for rung, step in behind.items() if last[-1]["step"] > step}
        if behind:
            self.figures.look()
        for rung, step in behind.items():
            value = self.figures.at(step)
            if value is None:
                continue
            others = values_of_others(run, rung, rule.metric)
            stops = worse(rule, value, others)
            told = value if finite(value) else None  # JSON has no NaN
            decided[str(rung)] = {
                "value": told,
                "stopped": stops,
                "others": len(others),
                "metric": rule.metric,
            }
            write_atomically(run / DECISIONS, json.dumps({"rungs": decided}, indent=1) + "\n")
            if stops:
                return True
        return False


def decisions(file: Path) -> dict[str, dict[str, Any]]:
    """What RUN/early_stop.json says of each rung; what is torn or of another shape counts for nothing."""
    rungs = read_json(file).get("rungs")
    found = rungs.items() if isinstance(rungs, dict) else ()
    return {str(rung): decision for rung, decision in found if isinstance(decision, dict)}


def value_at(run: Path, metric: str, step: int) -> float | None:
    """As `Figures.at`, for one look."""
    figures = Figures(run, metric)
    figures.look()
    return figures.at(step)


def values_of_others(run: Path, rung: float, metric: str) -> list[float]:
    """What the other members of the sweep have written of this rung so far, by the same metric.

    One that was judged by another, before the sweep's rule was changed, has nothing to compare. NaN is one
    that came so far and has diverged.
    """
    found = (
        decisions(path).get(str(rung), {}) for path in run.parent.glob(f"*/{DECISIONS}") if path.parent != run
    )
    values = (number(each.get("value")) for each in found if each.get("metric") == metric)
    return [math.nan if value is None else value for value in values]


def worse(rule: EarlyStop, value: float, others: Sequence[float]) -> bool:
    """Whether a member with `value` at a rung is to stop there, given the others' values so far."""
    lower = lower_is_better(rule.metric) if rule.best_is is None else rule.best_is == "lowest"
    sign = 1.0 if lower else -1.0
    own = sign * value
    rest = sorted(sign * other if finite(other) else math.inf for other in others)
    if not finite(own):
        return True
    if rule.rule == "median":
        return len(rest) >= rule.least and own > statistics.median(rest)
    allowed = math.ceil((len(rest) + 1) / rule.reduction)  # of all that came so far, this one included
    return sum(other < own for other in rest) >= allowed
