"""The model card of an export: README.md, and the loss over training as loss.png beside it.

A card says what the weights are (recipe, data, samples, commit), how they were judged, and how to load them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont

CURVE = "loss.png"
POINTS = 400
"""Most points of the curve: of a long run each is the mean of a stretch."""

_INK, _RULE, _PAPER, _LINE = (40, 40, 40), (222, 222, 222), (255, 255, 255), (31, 90, 180)
_FINE = 2  # drawn larger by this factor and scaled down, which smooths the line
_SIZE, _MARGIN = (720, 300), (64, 28, 16, 40)  # pixels: width, height; left, top, right, bottom


@dataclass(frozen=True)
class Story:
    """Where weights come from."""

    facts: Mapping[str, Any]  # objective, step, samples, data_hash, commit, evaluations, ...
    recipe: Mapping[str, Any]  # settings as in a config file; empty where they aren't known
    losses: Sequence[tuple[int, float]] = ()  # (samples seen, loss), in this order


@dataclass(frozen=True)
class Card:
    """What a card says of one export."""

    title: str
    library: str  # that opens it, as model hubs name it
    tags: Sequence[str]
    licence: str
    loading: str  # the lines of Python that load it
    note: str  # what they don't say
    difference: float  # largest, after reopening in a fresh process


def write(card: Card, story: Story, folder: Path) -> None:
    """README.md and, where any loss is known, loss.png. Raises OSError where they can't be written."""
    if story.losses:
        curve(story.losses).save(folder / CURVE)
    (folder / "README.md").write_text(text(card, story))


def text(card: Card, story: Story) -> str:
    """README.md, with the header that model hubs read."""
    head = {
        "library_name": card.library,
        "license": card.licence,
        "pipeline_tag": "image-feature-extraction",
        "tags": list(card.tags),
    }
    facts = dict(story.facts)
    judged = facts.pop("evaluations", {})
    facts["largest difference after reopening"] = f"{card.difference:.1e}"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {card.title}",
        f"```python\n{card.loading}\n```\n\n{card.note}",
        _table(("", ""), [(name.replace("_", " "), value) for name, value in facts.items()]),
        f"## Evaluations\n\n{_evaluations(judged, facts, card.library)}",
    ]
    if story.losses:
        parts.append(f"## Training\n\n![Loss over samples seen]({CURVE})")
    if story.recipe:
        recipe = yaml.safe_dump(dict(story.recipe), sort_keys=False, default_flow_style=None, width=100)
        parts.append(f"## Recipe\n\n```yaml\n{recipe}```")
    return "\n\n".join(parts) + "\n"


def _evaluations(judged: Mapping[str, Mapping[str, float]], facts: Mapping[str, Any], library: str) -> str:
    if judged:
        figures = [(name, *each) for name, values in judged.items() for each in values.items()]
        return _table(("evaluation", "figure", "value"), [(n, f, f"{v:.4g}") for n, f, v in figures])
    what = "this step" if facts.get("weights", "model") == "model" else f"the {facts['weights']} weights"
    if library == "open_clip":  # a folder that keel doesn't open
        return f"The run made none of {what}; `keel evaluate RUN kind=zero_shot data=DATA` does."
    return f"The run made none of {what}; `keel evaluate FOLDER kind=knn data=DATA` does."


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def curve(losses: Sequence[tuple[int, float]]) -> Image.Image:
    """Loss over samples seen, (720, 300) pixels. `losses`: at least one (samples, finite loss)."""
    points = _thinned(losses)
    (left, top, right, bottom), (width, height) = _MARGIN, _SIZE
    spans = [_span([point[axis] for point in points]) for axis in (0, 1)]

    def place(samples: float, loss: float) -> tuple[float, float]:
        across, up = ((v - low) / (high - low) for v, (low, high) in zip((samples, loss), spans, strict=True))
        x, y = left + across * (width - left - right), height - bottom - up * (height - top - bottom)
        return _FINE * x, _FINE * y

    image = Image.new("RGB", (_FINE * width, _FINE * height), _PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12 * _FINE)
    for tick in _ticks(*spans[1]):
        (x, y), (end, _) = place(spans[0][0], tick), place(spans[0][1], tick)
        pen.line((x, y, end, y), fill=_RULE, width=_FINE)
        pen.text((x - 8 * _FINE, y), f"{tick:g}", fill=_INK, font=font, anchor="rm")
    for tick in _ticks(*spans[0]):
        x, y = place(tick, spans[1][0])
        pen.text((x, y + 8 * _FINE), _short(tick), fill=_INK, font=font, anchor="ma")
    pen.text((8 * _FINE, 6 * _FINE), "loss", fill=_INK, font=font)
    pen.text((_FINE * (width - right), _FINE * (height - 6)), "samples", fill=_INK, font=font, anchor="rs")
    line = [place(*point) for point in points]
    pen.line(line, fill=_LINE, width=2 * _FINE, joint="curve")
    pen.circle(line[-1], 3 * _FINE, fill=_LINE)
    return image.resize(_SIZE, Image.Resampling.LANCZOS)


def _thinned(losses: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    count = len(losses)
    cuts = [count * number // min(count, POINTS) for number in range(min(count, POINTS) + 1)]
    stretches = [losses[start:end] for start, end in itertools.pairwise(cuts)]
    return [(s[-1][0], math.fsum(loss for _, loss in s) / len(s)) for s in stretches]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Four or so round numbers between the two."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(samples: float) -> str:
    """12000 -> 12 k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if samples >= size:
            return f"{samples / size:g} {letter}"
    return f"{samples:g}"
