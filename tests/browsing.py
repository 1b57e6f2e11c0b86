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

from funlora_lab.studies import notebooks

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NAMES = ("chromium", "chromium-browser", "google-chrome")
PANELS = ("lens", "layers", "samples", "confusion", "own_class", "runs", "report")
THEMES = ("Light", "Dark")
PATIENCE = 300_000  # milliseconds, on a loaded machine


def missing() -> str:
    """What the browser tests lack here; empty when they can run."""
    try:
        import axe_playwright_python.sync_playwright  # noqa: F401
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "Playwright or its axe is not installed (pip install -e '.[browser]')"
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
            try:
                told = json.loads(path.read_text())
                urllib.request.urlopen(told["url"] + "api", timeout=5)
                return told["token"]
            except (OSError, json.JSONDecodeError):  # it does not listen yet, or is still writing the file
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


def run_all(page, address: str) -> float:
    """Open the notebook, run all its cells and wait for the last one -> seconds from the command to the last panel."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()  # before, a run would ask for a kernel
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()
    begun = time.monotonic()
    panel(page, PANELS[-1]).locator(".funlora-panel").wait_for()
    return time.monotonic() - begun


def panel(page, name: str):
    """The output of the cell that shows ``bench.<name>``."""
    cells = page.locator(".jp-CodeCell")
    return cells.filter(has=page.locator(".cm-content", has_text=f"bench.{name}")).first.locator(".jp-OutputArea")


def press(part, words: str) -> None:
    """Click the button that bears exactly these words (its icon may stand before them)."""
    part.locator("button", has_text=re.compile(rf"^\s*{re.escape(words)}$")).first.click()


def run_cell(page, source: str) -> None:
    """Put a cell below the last one and run it."""
    page.locator(".jp-Notebook .jp-Cell").last.locator(".jp-InputPrompt").click()
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.insert_text(source)
    page.keyboard.press("Control+Enter")


def screenshots(target: Path, preset: str) -> None:
    """Every panel in use and the page with the lens, at two sizes in JupyterLab's light and dark theme."""
    import tempfile

    from funlora_lab.store import home

    target.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        with tempfile.TemporaryDirectory() as work, jupyterlab(Path(work), home(), preset, f"JupyterLab {theme}") as at:
            with page_of(1440, 900) as page:
                run_all(page, at)
                lens = panel(page, "lens").get_by_label("state")
                lens.fill("class=7 layer=13 off=15 13.frequency.2=4.5 13.frequency.7=9.5")
                lens.press("Enter")
                panel(page, "lens").locator("[data-place=unet] svg", has_text="class 7").wait_for()
                panel(page, "lens").get_by_alt_text(re.compile("class 7, bent")).wait_for()
                panel(page, "lens").locator("[data-place=samples]", has_text=re.compile("loss.*loss")).wait_for()
                for width, height in ((1440, 900), (1024, 768)):
                    page.set_viewport_size({"width": width, "height": height})
                    for name in PANELS:
                        part = panel(page, name)
                        part.evaluate("part => part.scrollIntoView()")
                        page.screenshot(path=target / f"{name}-{theme.lower()}-{width}.png")


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "digits")
