"""The workbench in a real browser: JupyterLab as ``funlora lab`` starts it, driven through Playwright.

Skipped with a reason where there is no Playwright, no axe or no Chromium.
"""

import re
import urllib.error
import urllib.request

import nbformat
import pytest
from browsing import PANELS, jupyterlab, missing, page_of, panel, press, run_all, run_cell

from funlora_lab import open_run, preset
from funlora_lab.workbench import report, runs

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")]
CELLS = len(nbformat.read(report.Path(report.__file__).parents[2] / "notebooks/00_workbench.ipynb", 4).cells)
KEYS = ("m", "0", "0", "d", "d", "x", "a", "b", "i", "i", "y", "r", "Shift+m", "Escape", "Control+Shift+-")
SAWTOOTH = """import torch
import funlora_lab
@funlora_lab.function("sawtooth", frequency=lambda p: torch.arange(1.0, p + 1))
def sawtooth(A, B, ponderation, frequency):
    z = frequency[..., None, None] * (A[..., None] * B[..., None, :])[..., None, :, :] / 6.28
    return (ponderation[..., None, None] * 2 * (z - (z + 0.5).floor())).mean(-3)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser-home")
    open_run(preset("smoke"), "cpu", home=folder)
    return folder


def test_the_workbench_works_in_jupyterlab(home, tmp_path):
    with jupyterlab(tmp_path, home, "smoke") as address, page_of(1024, 768) as page:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address.split("/lab/")[0] + "/api/contents")  # no token, no entry
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.goto(address)
        reads_well_before_it_is_run(page)
        run_all(page, address)
        fits_and_is_reachable(page)
        bends_a_class(page)
        keys_typed_inside_a_panel_leave_the_notebook_alone(page)
        looks_at_and_trains_a_function_of_ones_own(page, home)
        learns_an_own_class_and_takes_it_out_and_in(page, tmp_path)
        starts_and_stops_a_run(page, home)
        is_reachable_in_the_dark(page)
        assert not problems
        page.once("dialog", lambda dialog: dialog.accept())  # the notebook is not saved
        page.reload()
        page.locator(".jp-MarkdownCell", has_text="brings the panels back").wait_for()


def reads_well_before_it_is_run(page):
    """A notebook that nobody trusts yet shows pictures with words, and no remains of what was stripped."""
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    text = page.locator(".jp-Notebook").inner_text()
    assert not re.search(r"children=\(|singular value 1:", text)
    for words in page.eval_on_selector_all(".jp-Notebook img", "all => all.map(one => one.alt)"):
        assert words


def fits_and_is_reachable(page):
    """No panel scrolls sideways, the lens is one view of 600 pixels, and axe finds nothing critical or serious."""
    for name in PANELS:
        part = panel(page, name).locator(".funlora-panel")
        assert part.evaluate("e => e.scrollWidth <= e.clientWidth"), name
        inner = part.locator("*").evaluate_all("all => all.filter(e => e.scrollWidth > e.clientWidth + 1 && "
            "getComputedStyle(e).overflowX === 'auto').length")  # fmt: skip
        assert not inner, name
    assert panel(page, "lens").locator(".funlora-panel").bounding_box()["height"] <= 600
    axe_finds_nothing(page)


def axe_finds_nothing(page):
    """Nothing critical or serious, contrast of text among it."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, ".funlora-panel").response["violations"]
    worst = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("critical", "serious")]
    assert not worst


def is_reachable_in_the_dark(page):
    for words in ("Settings", "Theme", "JupyterLab Dark"):
        page.locator(".lm-MenuBar-item, .lm-Menu-item", has_text=re.compile(f"^{words}$")).first.click()
    page.locator("body[data-jp-theme-light=false]").wait_for(state="attached")
    axe_finds_nothing(page)


def lens_says(page, words: str):
    panel(page, "lens").locator("[data-place=picture] svg", has_text=words).wait_for()


def rank_of(page) -> int:
    return int(re.search(r"rank (\d+)", panel(page, "lens").locator("[data-place=picture]").text_content())[1])


def bends_a_class(page):
    """A slider moved with the keyboard changes F and the images; switches, undo and the text do what they say."""
    lens = panel(page, "lens")
    image = lens.get_by_alt_text(re.compile("bent")).first
    state = lens.get_by_label("state")

    def state_says(words: str, says: bool = True) -> None:
        asked = [state.element_handle(), words, says]
        page.wait_for_function("([e, words, says]) => e.value.includes(words) === says", arg=asked)

    lens.get_by_label(re.compile("^layer 13:")).click()
    state_says("layer=13")
    before = image.get_attribute("src")
    lens.get_by_label("frequency 2").focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    state_says("13.frequency.1=")
    changed = "([lens, before]) => lens.querySelector('img[alt*=bent]').src !== before"
    page.wait_for_function(changed, arg=[lens.element_handle(), before])
    lens.get_by_label("adapter of layer 13").press("Enter")
    lens_says(page, "rank 1")  # switched off, F is one everywhere
    press(lens, "Undo")
    state_says("off", False)
    press(lens, "Reset")
    state_says("frequency", False)
    state.fill("class=7 layer=14 off=15")
    state.press("Enter")
    lens.locator("[data-place=unet] svg", has_text="class 7").wait_for()
    lens.get_by_role("slider", name="time").press("Home")
    press(lens, "Play")
    press(lens, "Pause")
    lens.get_by_role("slider", name="time").press("End")
    press(lens, "Reset")


def keys_typed_inside_a_panel_leave_the_notebook_alone(page):
    """JupyterLab's single keys change, delete and restart; inside a control of any kind they do not."""
    lens, samples, own, runs_ = (panel(page, name) for name in ("lens", "samples", "own_class", "runs"))
    controls = {
        "slider": lens.get_by_label("frequency 1", exact=True),
        "layer": lens.get_by_label(re.compile("^layer 12:")),
        "switch": lens.get_by_label("adapter of layer 12"),
        "dropdown": lens.get_by_label("colour"),
        "button": lens.locator("button", has_text="Reset"),
        "text": runs_.get_by_label("settings", exact=True),
        "search": runs_.get_by_label("name holds"),
        "number": samples.get_by_label("seed of the noise"),
        "check box": own.get_by_label("also learn each moved by a pixel"),
        "pixel": own.get_by_label("row 1, column 1", exact=True),
        "image": samples.locator("[data-place=pictures] img").first,
    }
    for kind, control in controls.items():
        control.focus()
        for key in KEYS:
            page.keyboard.press(key)
        assert page.locator(".jp-Notebook .jp-Cell").count() == CELLS, kind
        assert page.locator(".jp-Dialog").count() == 0, kind
    assert page.locator(".jp-CodeCell").count() == len(_code()), "no cell changed its kind"
    runs_.get_by_label("settings", exact=True).fill("")
    search = runs_.get_by_label("name holds")
    search.fill("no such")
    runs_.get_by_text("0 runs").wait_for()
    search.fill("")
    runs_.get_by_text(re.compile("1 runs?,")).wait_for()
    number = samples.get_by_label("seed of the noise")
    number.fill("0")
    number.press("Tab")


def _code() -> list[str]:
    book = nbformat.read(report.Path(report.__file__).parents[2] / "notebooks/00_workbench.ipynb", 4)
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def looks_at_and_trains_a_function_of_ones_own(page, home):
    run_cell(page, SAWTOOTH)
    lens = panel(page, "lens")
    lens.locator("[data-place=picture] svg[aria-label^=sawtooth]").wait_for()  # its rank and spectrum at once
    assert rank_of(page) > 1
    press(lens, "Train with sawtooth")
    lens.get_by_alt_text(re.compile("samples at step")).first.wait_for()  # samples beside the loss while it trains
    lens.get_by_alt_text(re.compile("^loss of the (base|adapter)")).wait_for()
    lens.get_by_text("Done.").wait_for()
    panel(page, "runs").locator("[aria-pressed=true]", has_text="sawtooth").wait_for()
    assert "sawtooth" in set(runs.table(home)["method"])
    lens.get_by_label("function").select_option(index=0)


def learns_an_own_class_and_takes_it_out_and_in(page, folder):
    own, names = panel(page, "own_class"), ("lens", "samples", "own_class")
    for column in range(4):  # strokes, drawn by dragging
        for row in (1, 8):  # both in view
            own.get_by_label(f"row {row}, column {column + 2}", exact=True).scroll_into_view_if_needed()
        at = [own.get_by_label(f"row {row}, column {column + 2}", exact=True).bounding_box() for row in (1, 8)]
        page.mouse.move(at[0]["x"] + 9, at[0]["y"] + 9)
        page.mouse.down()
        page.mouse.move(at[1]["x"] + 9, at[1]["y"] + 9, steps=24)
        page.mouse.up()
        assert own.locator("[data-cell][aria-pressed=true]").count() == 8
        press(own, "Add the drawing")
        own.get_by_text(f"{column + 1} drawing").first.wait_for()
    own.get_by_label("name of the class").fill("stroke")
    own.get_by_label("name of the class").press("Tab")
    press(own, "Train the class")
    own.get_by_alt_text(re.compile("samples at step")).nth(1).wait_for()  # samples beside the loss while it trains
    own.get_by_alt_text(re.compile("^loss of the adapter")).wait_for()
    own.get_by_text("too few to speak of accuracy").wait_for()

    def known(count: int) -> None:
        for name in names[:2]:
            shown = panel(page, name).locator(
                ".funlora-panel option, .funlora-panel label", has_text=re.compile("^stroke$")
            )
            shown.first.wait_for(state="attached" if count else "detached")
        own.get_by_label("Remove class stroke").wait_for(state="visible" if count else "detached")

    known(1)
    with page.expect_download() as download:
        own.get_by_label("Download class stroke").click()
    download.value.save_as(folder / "stroke.safetensors")
    own.get_by_label("Remove class stroke").click()
    known(0)
    own.get_by_label("Bring back class stroke").click()
    known(1)
    own.get_by_label("Remove class stroke").click()
    known(0)
    own.get_by_label("Import a class").set_input_files(folder / "stroke.safetensors")
    known(1)


def starts_and_stops_a_run(page, home):
    started = panel(page, "runs")
    started.get_by_label("seed", exact=True).fill("5")
    started.get_by_label("settings", exact=True).fill("adapter_images=160000")
    started.get_by_label("settings", exact=True).press("Tab")
    press(started, "Start a run")
    started.get_by_text(re.compile("adapter of class .*, step")).wait_for()
    started.get_by_alt_text(re.compile("^adapter-6-0")).first.wait_for()
    stop = started.locator("button", has_text=re.compile("^Stop smoke-funlora-seed5"))
    stop.click()
    started.get_by_text(re.compile("same command resumes")).wait_for()
    started.locator("button", has_text=re.compile("^Resume smoke-funlora-seed5")).wait_for()
    assert runs.table(home).set_index("seed").loc[5, "state"] == "unfinished"


def test_the_report_shows_every_figure_with_networking_off(home, tmp_path):
    path = report.write(open_run(preset("smoke"), "cpu", home=home), tmp_path / "report.html")
    with page_of(390, 800, offline=True) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        assert len(widths) >= 5
        assert all(width > 100 for width in widths)
        assert page.locator("svg rect").count() > 20
        assert page.evaluate("document.documentElement.scrollWidth <= 390"), "it fits a telephone"
        assert not [url for url in asked if not url.startswith(("file:", "data:"))]
