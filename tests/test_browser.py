"""The workbench in a real browser: JupyterLab as ``funlora lab`` starts it, driven through Playwright.

Skipped with a reason where there is no Playwright or no Chromium.
"""

import re
import urllib.error
import urllib.request

import pytest
from browsing import jupyterlab, missing, page_of, panel, press, run_all

from funlora_lab import open_run, preset
from funlora_lab.workbench import report, runs

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser-home")
    open_run(preset("smoke"), "cpu", home=folder)
    return folder


def rank_of(functions) -> int:
    return int(re.search(r"rank (\d+)", functions.locator("svg").first.text_content())[1])


def test_the_workbench_works_in_jupyterlab(home, tmp_path):
    with jupyterlab(tmp_path, home, "smoke") as address, page_of() as page:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address.split("/lab/")[0] + "/api/contents")  # no token, no entry
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        run_all(page, address)
        moves_a_slider(page)
        draws_samples(page)
        starts_and_stops_a_run(page, home)
        exports_a_class(page, home)
        assert not problems


def moves_a_slider(page):
    """A slider moved with the keyboard changes the picture and its rank."""
    functions = panel(page, "functions")
    before, rank = functions.locator("svg").first.inner_html(), rank_of(functions)
    assert rank > 1
    spread = functions.locator(".widget-slider", has_text="spread of A and B").locator(".noUi-handle")
    spread.focus()
    spread.press("Home")  # no spread at all: F is the same everywhere
    functions.get_by_text("rank 1", exact=True).wait_for()
    spread.press("End")
    page.wait_for_function(
        "seen => !document.querySelector('svg[aria-label^=funlora]').innerHTML.includes(seen)", arg=">rank 1<"
    )
    assert rank_of(functions) > 1
    assert functions.locator("svg").first.inner_html() != before


def draws_samples(page):
    samples = panel(page, "samples")
    samples.locator("select").first.select_option(index=[0, 6])
    samples.locator("select").nth(1).select_option(index=1)
    press(samples, "Draw")
    samples.get_by_text("Done.").wait_for()
    assert samples.get_by_text("bit-identical").count() == 2
    assert samples.locator("img.pixels").first.evaluate("image => image.naturalWidth") > 8


def starts_and_stops_a_run(page, home):
    started = panel(page, "runs")
    started.get_by_label("seed", exact=True).fill("5")
    started.get_by_label("settings", exact=True).fill("adapter_images=160000")
    started.get_by_label("settings", exact=True).press("Tab")
    press(started, "Start")
    started.get_by_text(re.compile("adapter of class .*, step")).wait_for()
    press(started, "Stop")
    started.get_by_text(re.compile("same command resumes")).wait_for()
    frame = runs.table(home).set_index("seed")
    assert frame.loc[5, "state"] == "unfinished"


def exports_a_class(page, home):
    own = panel(page, "own_class")
    for shift in (0, 1):
        for i in range(8):
            own.locator(f"button[title='row {i + 1}, column {(i + shift) % 8 + 1}']").click()
        press(own, "Add the drawing")
        own.get_by_text(f"{shift + 1} drawing").first.wait_for()
    own.get_by_label("name of the class").fill("stroke")
    own.get_by_label("name of the class").press("Tab")
    press(own, "Train the class")
    own.get_by_text("Accuracy on real test images").wait_for()
    press(own, "Export as a file")
    own.get_by_text("Written:").wait_for()
    assert list(home.rglob("*stroke*.safetensors"))


def test_the_report_shows_every_figure_with_networking_off(home, tmp_path):
    path = report.write(open_run(preset("smoke"), "cpu", home=home), tmp_path / "report.html")
    with page_of(offline=True) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        assert len(widths) >= 4
        assert all(width > 100 for width in widths)
        assert page.locator("svg rect").count() > 20
        assert not [url for url in asked if not url.startswith(("file:", "data:"))]
