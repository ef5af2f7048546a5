"""The page in a real browser: nothing overflows, complains or asks the network, whoever looks at it."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pretrain.report import report
from tests.pretrain.report.browser import Browser, chromium
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


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["page", "single"])
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
    assert re.findall(r"<th scope=\"row\"><code>(.*?)</code>", table) == ["optimizer.lr"]
    assert "0.0005" in table
    assert "What differs" not in single.read_text()
