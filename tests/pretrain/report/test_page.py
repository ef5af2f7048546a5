"""The page in a real browser: nothing overflows, complains or asks the network, whoever looks at it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pretrain.report import report
from pretrain.report.reading import UNKNOWN
from tests.pretrain.report.browser import Browser, chromium
from tests.pretrain.report.many import eighteen
from tests.pretrain.report.told import Row, run_folder

CUT_OFF = """[...document.querySelectorAll('body *')].filter((e) =>
    !e.closest('.scroll, .sr, svg, .end, .tip')
    && e.getClientRects().length
    && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)).length"""
"""How many elements end outside of the window without a scrollbar: no reader would notice."""

HOSTILE = "<script>alert(1)</script>&\"'"


def box_of(selector: str) -> str:
    return f"document.querySelector('{selector}').getBoundingClientRect()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium here")
    with chromium(program) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten runs: names that are long, hostile, or the same; a NaN; more runs than there are colours."""
    root = tmp_path_factory.mktemp("runs")

    def ill(row: Row) -> Row:
        return row | ({"loss": None} if 100 < row["step"] < 120 else {})

    runs = [
        run_folder(root / "a" / "run"),
        run_folder(root / "b" / "run", lr=5e-4, change=ill),
        run_folder(root / ("a-very-long-name-" * 8), steps=90, pictures=("neighbours",)),
        run_folder(root / HOSTILE.replace("/", "|"), steps=60, pictures=("similarities",)),
        *(run_folder(root / f"seed-{seed}", steps=30, pictures=()) for seed in range(6)),
    ]
    report(runs, root / "report.html")
    return root / "report.html"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("single")
    report([run_folder(root / "run")], root / "report.html")
    return root / "report.html"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen runs of a sweep's folder."""
    root = tmp_path_factory.mktemp("many")
    eighteen(root)
    assert report([root / "sweep"], root / "report.html") == []
    return root / "report.html"


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["page", "single", "many"])
def test_it_fits_and_asks_nobody(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int, scheme: str
) -> None:
    with browser.page(request.getfixturevalue(which), width, scheme=scheme) as shown:  # type: ignore[arg-type]
        shown.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert shown.value("innerWidth") == width
        assert shown.value("document.documentElement.scrollWidth") <= width
        assert shown.complaints() == []
        assert shown.requests() == []
        assert shown.value(CUT_OFF) == 0
        dark = scheme == "dark"
        assert (
            shown.value("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
            is not dark
        )


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 375])
def test_values_are_shown_by_pointer_and_by_keys(browser: Browser, single: Path, width: int) -> None:
    with browser.page(single, width) as shown:
        box = shown.value(
            "(({x, y, width}) => [x, y, width])(document.querySelector('.plot').getBoundingClientRect())"
        )
        x, y = box[0] + box[2] / 2, box[1] + 50
        shown.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        told = shown.value("document.querySelector('.tip').innerText")
        samples, loss = re.fullmatch(r"(\d+) samples\s+([\d.]+)\s*", told).groups()  # type: ignore[union-attr]
        assert abs(int(samples) - 6400) < 100 and 0.25 < float(loss) < 0.45
        assert shown.value(f"(({{left, right}}) => left >= 0 && right <= innerWidth)({box_of('.tip')})")
        shown.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        assert shown.value("document.querySelector('.tip').hidden")
        shown.value("document.querySelector('.plot').focus()")
        for key, wanted in (("Home", "32 samples"), ("ArrowRight", "samples"), ("End", "12800 samples")):
            shown.call("Input.dispatchKeyEvent", type="keyDown", key=key)
            assert wanted in shown.value("document.querySelector('.tip').innerText")
        shown.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        assert shown.value("document.querySelector('.tip').hidden")
        assert shown.complaints() == []


@pytest.mark.chromium
def test_the_slider_goes_through_the_steps_of_a_picture(browser: Browser, single: Path) -> None:
    with browser.page(single, 1280) as shown:
        seen = "[...document.querySelector('.picture').querySelectorAll('img')]"
        seen += ".map((i) => !i.hidden && i.naturalWidth)"
        assert shown.value(seen) == [False, 96]
        shown.value("(() => { const s = document.querySelector('.picture input'); s.value = 0; "
                    "s.dispatchEvent(new Event('input')); })()")  # fmt: skip
        assert shown.value(seen) == [96, False]
        assert shown.value("document.querySelector('.picture .step').textContent") == "step 200"


@pytest.mark.chromium
def test_a_sheet_with_words_is_scrolled_on_a_phone_and_not_shrunk(browser: Browser, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", steps=30, pictures=("similarities", "attention"))
    for sheet in (run / "pictures").glob("*-similarities.png"):
        Image.new("RGB", (900, 300)).save(sheet)
    report([run], tmp_path / "report.html")
    with browser.page(tmp_path / "report.html", 375) as shown:
        sheet = "document.querySelector('img[alt^=similarities]:not([hidden])')"
        assert shown.value(f"{sheet}.getBoundingClientRect().width") == 560
        assert shown.value(f"{sheet}.closest('.scroll').scrollWidth") == 560
        assert shown.value("document.documentElement.scrollWidth") <= 375
        drawn = "[...document.querySelectorAll('.picture img')].map((i) => [i.naturalWidth, "
        drawn += "getComputedStyle(i).imageRendering])"
        assert {tuple(each) for each in shown.value(drawn)} == {(900, "auto"), (96, "pixelated")}


@pytest.mark.chromium
def test_whoever_cannot_see_it_is_told(browser: Browser, page: Path) -> None:
    with browser.page(page, 1280) as shown:
        assert shown.value("document.title") and shown.value("document.documentElement.lang") == "en"
        assert shown.value("[...document.images].every((i) => i.alt.length > 20)")
        assert shown.value(
            "[...document.querySelectorAll('.plot')].every((p) => p.getAttribute('aria-label').length > 20)"
        )
        assert shown.value("[...document.querySelectorAll('input')].every((i) => i.ariaLabel)")
        levels = [
            int(tag[1])
            for tag in shown.value("[...document.querySelectorAll('h1,h2,h3')].map((h) => h.tagName)")
        ]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert shown.value("document.querySelectorAll('.chart:has(.line) table').length") >= 10


def test_names_are_text_and_nothing_points_outside(page: Path) -> None:
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:|//|file:)""", text)


def test_what_differs_between_runs_is_told(page: Path, single: Path) -> None:
    text = page.read_text()
    [table] = re.findall(r"<caption>What differs</caption>.*?</table>", text, re.DOTALL)
    assert re.findall(r"<th scope=\"row\" class=\"first\"><code>(.*?)</code>", table) == ["optimizer.lr"]
    assert "0.0005" in table
    assert "What differs" not in single.read_text()


NAMES = "[...document.querySelectorAll('table.runs tbody th')].map((h) => h.innerText.trim().split('\\n')[0])"
COLUMN = """((title) => {
    const table = document.querySelector('table.runs');
    const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.innerText.startsWith(title));
    return [...table.tBodies[0].rows].map((row) => row.cells[at].innerText);
})"""


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 375])
def test_nothing_goes_beyond_an_edge_without_a_sign(browser: Browser, many: Path, width: int) -> None:
    """A table that is wider than its place fades where it goes on, and no longer at its end."""
    with browser.page(many, width) as shown:
        shown.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        wide = "[...document.querySelectorAll('.scroll')].filter((s) => s.scrollWidth > s.clientWidth + 2)"
        assert shown.value(f"{wide}.length") >= 2
        shown.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert shown.value(f"{wide}.every((s) => getComputedStyle(s).maskImage !== 'none')")
        shown.value("document.querySelector('.scroll').scrollLeft = 1e6")
        shown.value("document.querySelector('.scroll').dispatchEvent(new Event('scroll'))")
        assert shown.value("getComputedStyle(document.querySelector('.scroll')).maskImage") == "none"
        first = "document.querySelector('table.runs tbody th').getBoundingClientRect()"
        assert shown.value(f"{first}.left") >= 0, "whose row it is stays in sight"


@pytest.mark.chromium
def test_the_first_table_says_how_each_run_stands_and_what_is_its_own(browser: Browser, many: Path) -> None:
    with browser.page(many, 1280) as shown:
        names = shown.value(NAMES)
        assert len(names) == 18 and len(set(names)) == 18
        assert "mae-lr=0.0001,seed=0" in names and "clip-temperature=0.01" in names, (
            "no common beginning, no hash"
        )
        headings = shown.value(
            "[...document.querySelectorAll('table.runs thead th')].map((h) => h.innerText)"
        )
        assert headings[:5] == ["Run", "State", "Steps", "Last loss", "lr"]
        assert {"temperature", "knn/top1", "Objective"} <= set(headings)
        ill = shown.value("[...document.querySelectorAll('table.runs .ill')].map((c) => c.innerText)")
        assert sorted(filter(None, ill))[-3:] == ["✕ failed", "✕ not finite", "✕ not finite"]
        row = shown.value("[...document.querySelectorAll('table.runs tbody tr')].find((r) => "
                          "r.innerText.includes('1e+20')).innerText")  # fmt: skip
        assert "60 of 120" in row and "2.5e+19" in row, "of the rows of metrics, not of the last heartbeat"
        assert "8 losses in a row" in shown.value("document.querySelector('.notes').innerText")


@pytest.mark.chromium
def test_a_heading_sorts_and_what_is_unknown_comes_last(browser: Browser, many: Path) -> None:
    with browser.page(many, 1280) as shown:
        press = (
            "[...document.querySelectorAll('.runs thead button')].find((b) => b.innerText == '%s').click()"
        )
        shown.value(press % "lr")
        rates = [float(text) for text in shown.value(f"{COLUMN}('lr')")]
        assert rates == sorted(rates)
        shown.value(press % "knn/top1")
        shown.value(press % "knn/top1")
        figures = shown.value(f"{COLUMN}('knn/top1')")
        known = [float(text) for text in figures if text[0].isdigit()]
        assert known == sorted(known, reverse=True) and len(known) == 16
        assert figures[16:] == [UNKNOWN, "✕ not finite"]
        assert shown.value("document.querySelector('th[aria-sort]').ariaSort") == "descending"


@pytest.mark.chromium
def test_a_run_can_be_hidden_everywhere_and_shown_again(browser: Browser, many: Path) -> None:
    with browser.page(many, 1280) as shown:
        seen = "[...document.querySelectorAll('[data-run=\"2\"]')]"
        seen += ".filter((e) => getComputedStyle(e).display !== 'none').length"
        before = shown.value(seen)
        assert before > 8
        box = "document.querySelector('tr[data-row=\"2\"] input')"
        shown.value(f"{box}.click()")
        assert shown.value(seen) == 0 and shown.value(f"{box}.getClientRects().length") == 1
        shown.value("document.querySelector('[data-show=none]').click()")
        assert shown.value(
            "[...document.querySelectorAll('path.line')].every((l) => getComputedStyle(l).display === 'none')"
        )
        shown.value("document.querySelector('[data-show=all]').click()")
        assert shown.value(seen) == before
        assert shown.complaints() == []


@pytest.mark.chromium
def test_smoothing_calms_the_curves_and_leaves_measurements_alone(browser: Browser, many: Path) -> None:
    with browser.page(many, 1280) as shown:
        path = "[...document.querySelectorAll('%s path.line')].map((l) => l.getAttribute('d'))"
        curves, scores = shown.value(path % "figure.smooth"), shown.value(path % "#eval0")

        def restless(d: str) -> float:
            height = [float(each.split()[1]) for each in re.findall(r"[\d.]+ [\d.]+", d)]
            steps = [b - a for a, b in itertools.pairwise(height)]
            return sum(abs(b - a) for a, b in itertools.pairwise(steps))

        slide = "(() => { const s = document.querySelector('#smoothing'); s.value = %s; "
        slide += "s.dispatchEvent(new Event('input')); })()"
        shown.value(slide % 0.9)
        smooth = shown.value(path % "figure.smooth")
        assert restless(smooth[0]) < restless(curves[0]) / 3
        assert shown.value(path % "#eval0") == scores
        shown.value(slide % 0)
        assert shown.value(path % "figure.smooth") == curves and shown.complaints() == []


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 375])
def test_every_line_of_a_chart_has_its_name_in_sight(browser: Browser, many: Path, width: int) -> None:
    with browser.page(many, width) as shown:
        named = """[...document.querySelectorAll('figure.chart:has(path.line)')].map((f) => [
            f.querySelectorAll('path.line').length,
            [...f.querySelectorAll('.end em, .keys span')].filter((e) => e.getClientRects().length
                && e.getBoundingClientRect().right <= innerWidth).length])"""
        for lines, names in shown.value(named):
            assert names == lines or lines == 1


def test_objectives_have_a_scale_of_their_own_and_no_run_flattens_the_others(many: Path) -> None:
    text = many.read_text()
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", text)
    assert titles[:3] == ["Loss, clip", "Loss, mae", "Learning rate"]
    charts = {
        title: json.loads(data)
        for title, data in re.findall(
            r"<figcaption><h3>([^<]*)</h3>.*?<script type=\"application/json\">(.*?)</script>",
            text,
            re.DOTALL,
        )
    }
    assert charts["Loss, mae"]["y"][1] < 2 < 10 < charts["Loss, clip"]["y"][1]
    assert charts["Learning rate"]["y"][1] <= 0.1 and charts["Learning rate"]["log"]
    assert "mae-lr=1e+20,seed=0 leaves the scale: up to 2.5e19" in text
    assert "no finite value: mae-lr=1e+20,seed=0" in text
    assert "values that aren&#39;t finite: mae-lr=1e+20,seed=0 (30)" in text


def test_many_runs_have_a_row_each_for_their_time_and_few_a_chart(many: Path, single: Path) -> None:
    assert many.read_text().count('class="chart shares"') == 0 and '<table class="time">' in many.read_text()
    assert (
        single.read_text().count('class="chart shares"') == 1
        and '<table class="time">' not in single.read_text()
    )


def test_settings_that_vary_come_first_and_those_of_objectives_have_a_column_an_objective(many: Path) -> None:
    text = many.read_text()
    [within] = re.findall(
        r"<caption>What differs between runs of one objective</caption>.*?</table>", text, re.DOTALL
    )
    assert re.findall(r"<th scope=\"row\" class=\"first\"><code>(.*?)</code>", within) == [
        "optimizer.lr", "objective.temperature",
    ]  # fmt: skip
    [between] = re.findall(r"2 that differ between objectives.*?</table>", text, re.DOTALL)
    assert re.findall(r"<th scope=\"col\">(.*?)</th>", between) == ["clip", "mae"]
    assert "objective.mask_ratio" in between and "0.75" in between


def test_captions_in_any_script_are_words_of_the_page(many: Path) -> None:
    text = many.read_text()
    [texts] = re.findall(r"<ol class=\"captions\".*?</ol>", text, re.DOTALL)
    assert re.findall(r"<li dir=\"auto\">(.*?)</li>", texts) == [
        "红色的圆", "un cercle rouge à l&#39;œuf", "🐈 on a 🚲", "دائرة حمراء",
    ]  # fmt: skip
