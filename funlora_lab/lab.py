"""JupyterLab on the notebooks: bound to this machine, with its token on, over the same runs as the command."""

import os
import subprocess
import sys
from pathlib import Path

from funlora_lab.errors import LabError
from funlora_lab.headless import notebooks_folder
from funlora_lab.store import home

ADDRESS = "127.0.0.1"


def command(port: int, browser: bool, folder: Path | None = None) -> list[str]:
    """The words that start JupyterLab; it makes its own token, which is not among words that others may read."""
    words = [sys.executable, "-m", "jupyterlab", str(folder or notebooks_folder()), f"--ServerApp.ip={ADDRESS}"]
    return [*words, f"--ServerApp.port={port}", *([] if browser else ["--no-browser"])]


def surroundings() -> dict[str, str]:
    """The environment of JupyterLab: the home of the runs, and no empty token, which would let anybody in."""
    kept = {name: value for name, value in os.environ.items() if name != "JUPYTER_TOKEN" or value}
    return kept | {"FUNLORA_HOME": str(home())}


def start(port: int = 8888, browser: bool = True) -> int:
    """Start JupyterLab and stay until it ends; returns its exit status."""
    if not 1 <= port <= 65535:
        raise LabError(f"port={port}: accepted is a whole number from 1 to 65535.")
    try:
        return subprocess.call(command(port, browser), env=surroundings())
    except KeyboardInterrupt:
        return 0
