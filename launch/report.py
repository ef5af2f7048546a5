"""`keel report`: what runs did, on one page that needs nothing but a browser."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import yaml
from PIL import Image

from configs.errors import RunError
from launch import charts
from launch.charts import Bar, Line, short
from launch.run_files import Row, read_json, tail
from pretrain.folder import RunFolder

WHOLE = 32 << 20
"""Bytes of metrics that are read whole; of a longer file, rows at equal distances."""

SAMPLED = 4000
"""Rows that are read of a file longer than `WHOLE`."""

CAPTIONS = {
    "reconstructions": "Left to right: the image, what the encoder was shown of it, what was rebuilt",
    "neighbours": "An image and those with the nearest features; of another class where framed",
    "similarities": "Captions against images; each caption's nearest image is framed",
    "attention": "What the last block's class token attends to, as bright as that",
    "components": "First three principal components of the patches' features, as colours",
}


@dataclass(frozen=True)
class Picture:
    """A PNG of a run, as a data address."""

    caption: str
    alt: str
    data: str
    small: bool  # to be enlarged without blurring its pixels


@dataclass(frozen=True)
class RunReport:
    """All that the page says of a run."""

    name: str
    colour: int
    objective: str
    state: str
    rows: Sequence[Row]
    evaluations: Sequence[Row]
    attempts: Sequence[Row]
    heartbeat: str | None
    pictures: Sequence[Picture]
    config: str
    settings: dict[str, Any]  # path of a setting -> value

    def last(self, name: str) -> Any:
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)

    @property
    def step(self) -> str:
        return str(self.last("step") or 0)

    @property
    def samples(self) -> str:
        return short(float(self.last("samples") or 0))

    @property
    def loss(self) -> str:
        loss = self.last("loss")
        return "-" if loss is None else f"{loss:.4g}"

    @property
    def rate(self) -> str:
        rates = [rate for _, rate in curve(self.rows, "samples_per_second")]
        return short(median(rates)) if rates else "-"

    @property
    def waiting(self) -> str:
        waited = [share for _, share in shares(self.rows)]
        return f"{median(waited):.1f} % of a step" if waited else "-"

    @property
    def stall(self) -> str:
        stalls = [seconds for _, seconds in curve(self.rows, "checkpoint_stall")]
        return f"{median(stalls):.2g} s" if stalls else "-"


def write(folders: Sequence[Path], to: Path) -> int:
    """Write the page on these runs; gives its size in bytes. Raises `RunError`."""
    for folder in folders:
        if not RunFolder(folder.expanduser().absolute()).exists():
            raise RunError(f"{folder}: not a run folder (no config.yaml in it); train one with keel train")
    content = page([collect(folder, number) for number, folder in enumerate(folders)])
    beside = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(content)
        beside.replace(to)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(f"{to}: can't be written: {error.strerror}; choose another file with -o") from error
    return to.stat().st_size


def collect(folder: Path, number: int) -> RunReport:
    """What the files of a run say; what is missing or torn counts for nothing."""
    state, text = read_json(folder / "run.json"), (folder / "config.yaml").read_text()
    config = yaml.safe_load(text)
    return RunReport(
        name=folder.absolute().name,
        colour=number % charts.COLOURS,
        objective=config["objective"]["name"],
        state=str(state.get("status", "new")),
        rows=metrics(folder / "metrics.jsonl"),
        evaluations=[row for row in tail(folder / "evaluations.jsonl", size=WHOLE) if row.get("values")],
        attempts=state.get("attempts", []),
        heartbeat=state.get("heartbeat"),
        pictures=list(_pictures(folder / "pictures")),
        config=text,
        settings=dict(_flat(config)),
    )


def metrics(file: Path) -> Sequence[Row]:
    """Rows of a metrics file: all, or of a long file `SAMPLED` ones at equal distances, and its end."""
    try:
        size = file.stat().st_size
    except OSError:
        return []
    if size <= WHOLE:
        return tail(file, size=WHOLE)
    found: list[Row] = []
    with file.open("rb") as content:
        for number in range(SAMPLED):
            content.seek(number * size // SAMPLED)
            if number:
                content.readline()  # the rest of a row
            found += _row(content.readline())
    return [*found, *tail(file, last=1)]


def _row(line: bytes) -> list[Row]:
    try:
        row = json.loads(line)
    except ValueError:
        return []
    return [row] if isinstance(row, dict) else []


def _flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flat(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, values


def _pictures(folder: Path) -> Iterator[Picture]:
    """The newest of each name."""
    newest: dict[str, tuple[int, Path]] = {}
    for file in sorted(folder.glob("*.png")):
        found = re.fullmatch(r"(?:step-(\d+)-|pictures-)?(.+)\.png", file.name)
        assert found is not None
        step = int(found[1] or 0)
        if found[2] not in newest or step >= newest[found[2]][0]:
            newest[found[2]] = step, file
    for name, (step, file) in newest.items():
        content = file.read_bytes()
        with Image.open(file) as image:
            small = image.width < 300
        about = CAPTIONS.get(name, name)
        when = f" (step {step})" if step else ""
        data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        yield Picture(f"{name.capitalize()}{when}", about, data, small)


def page(runs: Sequence[RunReport]) -> str:
    """The whole page as HTML."""
    with_names = _own_names(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return environment.get_template("report.html.j2").render(
        title=title,
        made=f"keel report, {datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        runs=with_names,
        sections=[(heading, found) for heading, found in sections(with_names) if found],
        evaluations=last_evaluations(with_names),
        differences=differences(with_names),
        timeline=charts.timeline("Attempts over time", [r.name for r in with_names], list(bars(with_names))),
    )


def _own_names(runs: Sequence[RunReport]) -> Sequence[RunReport]:
    """Runs of one name are told apart by their number."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({number + 1})") if names.count(run.name) > 1 else run
        for number, run in enumerate(runs)
    ]


def sections(runs: Sequence[RunReport]) -> Iterator[tuple[str, list[str]]]:
    """(heading, charts) in the order of the page."""

    def chart(title: str, name: str, unit: str = "", logarithmic: bool = False) -> str:
        series = [Line(r.name, r.colour, curve(r.rows, name)) for r in runs]
        return charts.lines(title, series, x_name="samples seen", unit=unit, logarithmic=logarithmic)

    def drawn(*found: str) -> list[str]:
        return [each for each in found if each]

    yield (
        "Training",
        drawn(
            chart("Loss", "loss", logarithmic=True),
            chart("Learning rate", "lr"),
            chart("Gradient norm", "grad_norm", logarithmic=True),
        ),
    )
    waiting = [Line(r.name, r.colour, shares(r.rows)) for r in runs]
    yield (
        "Throughput and what held it up",
        drawn(
            chart("Throughput", "samples_per_second", " samples/s"),
            charts.lines("Waiting for data", waiting, x_name="samples seen", unit=" % of a step"),
            chart("Standing still to save", "checkpoint_stall", " s"),
            chart("Slowest rank's own work", "slowest_busy", " s a step"),
        ),
    )
    yield (
        "Evaluations",
        drawn(
            *(
                charts.lines(
                    name, [Line(r.name, r.colour, scores(r, name)) for r in runs], x_name="samples seen"
                )
                for name in figures(runs)
            )
        ),
    )
    own = sorted(
        {name for run in runs for row in run.rows[-1:] for name in row if name.startswith("objective/")}
    )
    yield (
        "The objective's own figures",
        drawn(*(chart(n.partition("/")[2].replace("_", " "), n) for n in own)),
    )


def curve(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """(samples, value) where a row has a value."""
    return [(row["samples"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def shares(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(samples, percent of a step spent waiting for data)."""
    return [
        (row["samples"], 100 * row["data_wait"] / row["seconds"])
        for row in rows
        if row.get("seconds") and row.get("data_wait") is not None
    ]


def figures(runs: Sequence[RunReport]) -> list[str]:
    """Every evaluated figure, as "knn/top1"."""
    return sorted(
        {f"{row['name']}/{name}" for run in runs for row in run.evaluations for name in row["values"]}
    )


def scores(run: RunReport, name: str) -> list[tuple[float, float]]:
    """(samples, value) of one figure."""
    kind, _, figure = name.rpartition("/")
    found = [
        (row["samples"], row["values"][figure])
        for row in run.evaluations
        if row["name"] == kind and figure in row["values"]
    ]
    return sorted(found)


def last_evaluations(runs: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Every figure with each run's last value."""
    return [
        (name, [f"{points[-1][1]:.4g}" if (points := scores(run, name)) else "-" for run in runs])
        for name in figures(runs)
    ]


def differences(runs: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Settings that aren't the same in all runs, with each run's value."""
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    rows = [(path, [str(run.settings.get(path, "-")) for run in runs]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


GOOD_ENDS = frozenset({"done", "stop_after", "early_stop"})


def bars(runs: Sequence[RunReport]) -> Iterator[Bar]:
    """Attempts on the clock; one that was killed ends where its last row does."""
    for lane, run in enumerate(runs):
        for number, each in enumerate(run.attempts):
            start = datetime.fromisoformat(each["started"]).timestamp()
            own = [row["time"] for row in run.rows if row.get("attempt") == each["attempt"] and "time" in row]
            last = number == len(run.attempts) - 1
            if each.get("ended"):
                end = datetime.fromisoformat(each["ended"]).timestamp()
            elif last and run.heartbeat:
                end = datetime.fromisoformat(run.heartbeat).timestamp()
            else:
                end = max(own, default=start)
            working = last and run.state == "running"
            reason = each.get("reason") or ("at work" if working else "killed")
            label = f"{run.name}, attempt {each['attempt']}: {reason}, from step {each['from_step']}"
            yield Bar(lane, start, max(end, start), label, working or reason in GOOD_ENDS)
