"""`keel report`: the page says what the files say, and a browser shows it whole, at any width, offline."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from configs.loading import dump, load
from launch import charts, report
from launch.charts import Line
from pretrain.config import RunConfig
from tests.launch import browser

Keel = Callable[..., tuple[int, str, str]]
HOSTILE = "<img src=x onerror=alert(1)>"


def made_run(root: Path, name: str, lr: float, rows: int = 200, attempts: int = 2) -> Path:
    """A run folder as a run of `rows` rows leaves it, interrupted once."""
    folder = root / name
    (folder / "pictures").mkdir(parents=True)
    changes = [f"run.dir={folder}", f"optimizer.lr={lr}", "optimizer.base_lr=null"]
    config = load("smoke/mae", RunConfig, changes)
    (folder / "config.yaml").write_text(dump(config))
    started = ["2026-11-01T10:00:00+00:00", "2026-11-01T11:30:00+00:00"]
    state = {
        "id": name, "status": "done", "heartbeat": "2026-11-01T12:00:00+00:00",
        "attempts": [
            {"attempt": 1, "from_step": 0, "world_size": 4, "started": started[0]},
            {"attempt": 2, "from_step": 100, "world_size": 2, "started": started[1],
             "ended": "2026-11-01T12:00:00+00:00", "reason": "done"},
        ][:attempts],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(state))
    lines = [
        {
            "attempt": 1 if step <= 100 else 2, "step": step, "samples": 32 * step, "loss": 3 * 0.99**step,
            "lr": lr * step / rows, "grad_norm": 40.0 if step == 77 else 1.0, "samples_per_second": 900.0,
            "data_wait": 0.01, "seconds": 0.1, "time": 1793527200.0 + 10 * step,
            **({"checkpoint_stall": 0.02} if step % 50 == 0 else {}), "objective/effective_rank": 7.5,
        }
        for step in range(1, rows + 1)
    ]  # fmt: skip
    torn = '{"step": 201, "lo'
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + torn)
    scores = [
        {"step": step, "samples": 32 * step, "name": "knn", "values": {"top1": step / 4}}
        for step in (100, 200)
    ]
    (folder / "evaluations.jsonl").write_text("\n".join(map(json.dumps, scores)) + "\n")
    for step in (100, 200):
        Image.new("RGB", (900, 300), (step, 80, 80)).save(folder / f"pictures/step-{step:08d}-neighbours.png")
    Image.new("RGB", (96, 256), (0, 80, 80)).save(folder / "pictures/reconstructions.png")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [made_run(root, f"slow-{HOSTILE.replace('/', '')}", 1e-3), made_run(root, "fast", 4e-3)]


def test_the_command(keel: Keel, two: list[Path], tmp_path: Path) -> None:
    to = tmp_path / "new" / "report.html"
    code, out, err = keel("report", *two, "-o", to)
    assert code == 0 and str(to) in out and not err
    assert [path.name for path in to.parent.iterdir()] == ["report.html"]
    code, _, err = keel("report", tmp_path, "-o", to)
    assert code == 2 and "not a run folder" in err
    code, _, err = keel("report", two[0], "-o", "/proc/report.html")
    assert code == 2 and "can't be written" in err


def test_it_says_what_the_files_say(two: list[Path]) -> None:
    runs = [report.collect(folder, number) for number, folder in enumerate(two)]
    assert [len(run.rows) for run in runs] == [200, 200], "the torn row counts for nothing"
    assert report.curve(runs[0].rows, "loss")[9] == (320, 3 * 0.99**10)
    assert [share for _, share in report.shares(runs[0].rows)] == pytest.approx([10.0] * 200)
    assert report.last_evaluations(runs) == [("knn/top1", ["50", "50"])]
    assert dict(report.differences(runs))["optimizer.lr"] == ["0.001", "0.004"]
    assert "train.batch_size" not in dict(report.differences(runs))
    first, second = [bar for bar in report.bars(runs) if bar.lane == 0]
    assert (first.good, second.good) == (False, True) and "killed" in first.label
    assert first.end == 1793527200.0 + 1000, "a killed attempt ends with its last row"
    assert [p.caption for p in runs[0].pictures] == ["Reconstructions", "Neighbours (step 200)"]


def test_a_spike_survives_thinning() -> None:
    points = [(float(x), 1.0 if x != 77_777 else 50.0) for x in range(1_000_000)]
    kept = charts.thinned(points)
    assert len(kept) <= charts.POINTS and (77_777.0, 50.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_a_long_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "WHOLE", 10_000)
    monkeypatch.setattr(report, "SAMPLED", 50)
    folder = made_run(tmp_path, "long", 1e-3, rows=2000)
    steps = [row["step"] for row in report.metrics(folder / "metrics.jsonl")]
    assert 45 <= len(set(steps)) <= 51 and steps == sorted(steps) and steps[0] == 1 and steps[-1] == 2000


def test_ticks_are_round_and_within() -> None:
    for low, high in ((0, 1), (0.13, 97), (-3, 4), (1e-7, 3e-7), (1234567, 1234999)):
        found = charts.ticks(low, high)
        assert 2 <= len(found) <= 12
        assert all(low - 1e-9 <= value <= high * (1 + 1e-9) for value in found)
        steps = {f"{b - a:.6g}" for a, b in pairwise(found)}
        assert len(steps) == 1
    assert charts.powers(0.02, 3000) == [0.1, 1.0, 10.0, 100.0, 1000.0]
    assert [charts.short(v) for v in (0, 1.5e-4, 999.9, 12_345, 2.5e6)] == [
        "0",
        "0.00015",
        "1k",
        "12.3k",
        "2.5M",
    ]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 1e-9, 5e6], [-3.0, 4.0], [1e-8, 1.0]])
def test_a_curve_stays_on_its_paper(values: list[float]) -> None:
    line = Line("a & b", 0, [(float(x), y) for x, y in enumerate(values)])
    drawn = charts.lines("title <>", [line], x_name="samples", logarithmic=True)
    svg = ElementTree.fromstring(drawn).find("svg")
    assert svg is not None
    points = svg.findall(".//polyline")[0].get("points", "").split()
    assert len(points) == len(values)
    for point in points:
        x, y = map(float, point.split(","))
        assert math.isfinite(x + y) and 0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT
    assert charts.lines("empty", [Line("a", 0, [])], x_name="x") == ""


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_shows_it_whole_and_asks_for_nothing(two: list[Path], tmp_path: Path, width: int) -> None:
    page = tmp_path / "report.html"
    report.write(two, page)
    hover = """(() => {
      const svg = document.querySelector('figure.chart svg'), box = svg.getBoundingClientRect();
      const at = {clientX: box.left + box.width / 2, clientY: box.top + 9};
      svg.dispatchEvent(new PointerEvent('pointermove', at));
      const tip = document.querySelector('.tip'), images = [...document.images];
      return {
        charts: document.querySelectorAll('figure.chart').length,
        tip: tip.hidden ? '' : tip.textContent,
        pictures: images.map(image => image.naturalWidth),
        alts: images.map(image => image.alt),
        smuggled: document.querySelectorAll('img[src=x]').length,
      };
    })()"""
    seen = browser.look(page, width, hover)
    assert seen.needed <= seen.width and seen.overflowing == []
    assert seen.requests == [] and seen.complaints == []
    assert seen.facts["charts"] >= 8 and "fast" in seen.facts["tip"]
    assert sorted(seen.facts["pictures"]) == [96, 96, 900, 900] and all(seen.facts["alts"])
    assert seen.facts["smuggled"] == 0


@pytest.mark.chromium
def test_the_browser_would_notice(tmp_path: Path) -> None:
    """What the test above looks for is seen where it is there."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><div style='width:3000px'>x</div><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('no'); undefinedName()</script></body>"
    )
    seen = browser.look(page, 375)
    assert seen.needed > seen.width and seen.overflowing
    assert seen.requests == ["http://127.0.0.1:9/x.png"] and len(seen.complaints) >= 2
