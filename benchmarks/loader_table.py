"""The table of `loader.py`: medians, ratios of medians in the same rounds, and whether the aim was met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Rounds = Sequence[dict[str, dict[str, Any] | None]]

RATIOS = (
    ("loader, antialiased, against webdataset + PIL", "keel", "webdataset + PIL", 1.75),
    ("loader, fast linear resize, against webdataset + PIL", "keel, fast resize", "webdataset + PIL", 2.0),
    ("loader against webdataset + the same decoder", "keel", "webdataset + same decoder", 1.15),
    (
        "loader against mosaicml-streaming + the same decoder",
        "keel",
        "mosaicml-streaming + same decoder",
        1.3,
    ),
    ("loader, antialiased, against bare libjpeg-turbo", "keel", "bare libjpeg-turbo", 0.52),
    ("loader, fast, against bare libjpeg-turbo", "keel, fast resize", "bare libjpeg-turbo", 0.60),
    ("raw read with checksum against webdataset", "keel, raw", "webdataset, raw", 4.0),
)


def cpu_ms(one: dict[str, Any]) -> float:
    return float(one["cpu"]) / float(one["samples"]) * 1e3


def rate(one: dict[str, Any]) -> float:
    return float(one["samples"]) / float(one["wall"])


def medians(rounds: Rounds, name: str, value: Callable[[dict[str, Any]], float]) -> float | None:
    found = [value(one) for one in (row.get(name) for row in rounds) if one is not None]
    return statistics.median(found) if found else None


def ratio(rounds: Rounds, ours: str, theirs: str, value: Callable[[dict[str, Any]], float]) -> float | None:
    """Median over the rounds of the ratio within a round."""
    found = [
        value(a) / value(b)
        for a, b in ((row.get(ours), row.get(theirs)) for row in rounds)
        if a is not None and b is not None
    ]
    return statistics.median(found) if found else None


def table(rounds: Rounds) -> str:
    """Markdown."""
    lines = [f"Medians of {len(rounds)} interleaved rounds.", ""]
    lines += ["| contestant | CPU ms an image | images/s |", "|---|---|---|"]
    skipped = ("resume 0.01", "resume 0.9", "order")
    for name in (name for name in rounds[0] if name not in skipped):
        cpu, speed = medians(rounds, name, cpu_ms), medians(rounds, name, rate)
        if cpu is not None and speed is not None:
            lines.append(f"| {name} | {cpu:.3f} | {speed:.0f} |")
    lines += ["", "| what | aim | by CPU time | by wall time | met |", "|---|---|---|---|---|"]
    for title, ours, theirs, aim in RATIOS:
        by_cpu = ratio(rounds, theirs, ours, cpu_ms)
        by_wall = ratio(rounds, ours, theirs, rate)
        if by_cpu is None or by_wall is None:
            lines.append(f"| {title} | {aim:g} x | - | - | not measured |")
            continue
        lines.append(f"| {title} | {aim:g} x | {by_cpu:.2f} | {by_wall:.2f} | {_met(by_cpu >= aim)} |")
    overhead = medians(rounds, "keel, no decode", cpu_ms)
    if overhead is not None:
        lines.append(
            f"| overhead without decode | <= 0.15 ms | {overhead:.3f} ms | | {_met(overhead <= 0.15)} |"
        )
    early, late = (medians(rounds, f"resume {share}", _seconds) for share in ("0.01", "0.9"))
    if early and late:
        met = _met(late / early <= 1.2)
        lines.append(
            f"| first batch at 90 % over at 1 % | <= 1.2 x | | {late / early:.2f} ({late:.2f} s) | {met} |"
        )
    seek, memory = (
        medians(rounds, "order", lambda one, key=key: float(one[key])) for key in ("seconds", "megabytes")
    )
    if seek and memory:
        met = _met(seek <= 0.5 and memory <= 100)
        lines.append(f"| seek in 2e9 samples | <= 0.5 s, 100 MB | | {seek:.2f} s, {memory:.0f} MB | {met} |")
    return "\n".join(lines) + "\n"


def _seconds(one: dict[str, Any]) -> float:
    return float(one["seconds"])


def _met(met: bool) -> str:
    return "yes" if met else "**no**"
