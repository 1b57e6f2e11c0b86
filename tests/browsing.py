"""JupyterLab in a headless Chromium, for the browser test and for screenshots of every panel.

python tests/browsing.py FOLDER [PRESET]     writes FOLDER/<panel>-<theme>.png, over the stored run of PRESET
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat

from funlora_lab.workbench import notebooks

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NAMES = ("chromium", "chromium-browser", "google-chrome")
PANELS = ("functions", "samples", "layers", "runs", "own_class", "report")
THEMES = ("Light", "Dark")
PATIENCE = 120_000  # milliseconds


def missing() -> str:
    """What the browser tests lack here; empty when they can run."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "Playwright is not installed (pip install -e '.[browser]')"
    return "" if chromium() else "no Chromium is installed (Debian: apt-get install chromium)"


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def prepared(folder: Path, preset: str, theme: str) -> Path:
    """A copy of the workbench notebook with ``preset`` as its parameter, and JupyterLab's settings beside it."""
    notebook = nbformat.read(notebooks.folder() / "00_workbench.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace('preset: str = "digits"', f'preset: str = "{preset}"')
            assert f'"{preset}"' in cell.source
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "notebooks/00_workbench.ipynb")
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "apputils-extension/themes": {"theme": theme},
    }
    for name, value in settings.items():
        path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return folder / "notebooks"


@contextmanager
def jupyterlab(folder: Path, home: Path, preset: str, theme: str = "JupyterLab Light"):
    """Start JupyterLab as ``funlora lab`` does; yields the address of the notebook with its token."""
    with socket.socket() as free:
        free.bind((notebooks.ADDRESS, 0))
        port = free.getsockname()[1]
    copied = prepared(folder, preset, theme)
    own = {"JUPYTERLAB_SETTINGS_DIR": folder / "settings", "JUPYTER_CONFIG_DIR": folder / "config"}
    own |= {"JUPYTER_RUNTIME_DIR": folder / "runtime", "FUNLORA_HOME": home}
    with notebooks.environment() as variables, open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            notebooks.lab_command(port, False, copied) + (["--allow-root"] if os.geteuid() == 0 else []),
            env=variables | {name: str(value) for name, value in own.items()},
            stdout=log,
            stderr=log,
        )
        try:
            yield f"http://{notebooks.ADDRESS}:{port}/lab/tree/00_workbench.ipynb?token={_token(folder, server)}"
        finally:
            server.terminate()
            server.wait(30)


def _token(folder: Path, server: subprocess.Popen) -> str:
    """The token that the server made for itself, once it listens."""
    for _ in range(600):
        for path in (folder / "runtime").glob("jpserver-*.json"):
            told = json.loads(path.read_text())
            try:
                urllib.request.urlopen(told["url"] + "api", timeout=5)
                return told["token"]
            except OSError:
                pass
        assert server.poll() is None, (folder / "server.log").read_text()
        time.sleep(0.1)
    raise AssertionError((folder / "server.log").read_text())


@contextmanager
def page_of(width: int = 1500, height: int = 1000, **settings):
    """A page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height}, **settings)
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def run_all(page, address: str):
    """Open the notebook, run all its cells and wait for the last one."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()  # before, a run would ask for a kernel
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()
    page.locator(".jp-OutputArea-output", has_text="checked: ").wait_for()


def panel(page, name: str):
    """The output of the cell that shows ``bench.<name>``."""
    cells = page.locator(".jp-CodeCell")
    return cells.filter(has=page.locator(".cm-content", has_text=f"bench.{name}")).first.locator(".jp-OutputArea")


def press(part, words: str) -> None:
    """Click the button that bears exactly these words (its icon may stand before them)."""
    part.locator("button", has_text=re.compile(rf"^\s*{re.escape(words)}$")).first.click()


def screenshots(target: Path, preset: str) -> None:
    """Every panel in use, in JupyterLab's light and dark theme."""
    import tempfile

    from funlora_lab.store import home

    target.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        with tempfile.TemporaryDirectory() as work, jupyterlab(Path(work), home(), preset, f"JupyterLab {theme}") as at:
            with page_of(height=2600) as page:
                run_all(page, at)
                _use(page)
                for name in PANELS:
                    panel(page, name).screenshot(path=target / f"{name}-{theme.lower()}.png")
                page.set_viewport_size({"width": 1300, "height": 1500})
                panel(page, "functions").locator("svg").first.scroll_into_view_if_needed()
                page.screenshot(path=target / f"page-{theme.lower()}.png")


def _use(page) -> None:
    """Put something to see into every panel."""
    samples = panel(page, "samples")
    samples.locator("select").first.select_option(index=[0, 3, 8])
    samples.locator("select").nth(1).select_option(index=1)
    press(samples, "Draw")
    samples.get_by_text("Done.").wait_for()
    for sweep in samples.locator("button", has_text="Sweep").all():
        sweep.click()
    samples.locator("img.pixels").nth(20).wait_for()
    own = panel(page, "own_class")
    for shift in (0, 1, 2):
        for i in range(8):
            own.locator(f"button[title='row {i + 1}, column {(i + shift) % 8 + 1}']").click()
            own.locator(f"button[title='row {i + 1}, column {(7 - i + shift) % 8 + 1}']").click()
        press(own, "Add the drawing")
        own.get_by_text(f"{shift + 1} drawing").first.wait_for()
    press(own, "Train the class")
    own.get_by_text("Accuracy on real test images").wait_for()
    report = panel(page, "report")
    press(report, "Write the report")
    report.get_by_text("Save a copy").wait_for()


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "digits")
