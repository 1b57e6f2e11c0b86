"""The notebooks without a person (papermill, with the parameters checked first), and in JupyterLab.

papermill itself only warns of a parameter that a notebook does not have; a typo would then silently run the default.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from funlora_lab.errors import LabError
from funlora_lab.experiment import KINDS
from funlora_lab.presets import preset as find_preset
from funlora_lab.store import checkout, home

ADDRESS = "127.0.0.1"
TYPES = {kind.__name__: kind for kind in (int, float, bool, str)}  # that a parameter's annotation may name


def folder() -> Path:
    """The folder of the notebooks beside the package; raises LabError when the package was installed without them."""
    if not checkout() or not (checkout() / "notebooks").is_dir():
        raise LabError("The notebooks are not installed: run from a clone of the repository (pip install -e .).")
    return checkout() / "notebooks"


def assign(notebooks: list[Path], preset: str, settings: list[str]) -> dict[Path, dict]:
    """Which notebook gets which parameters; raises LabError for one that no notebook has, before anything runs."""
    import papermill

    known = {notebook: papermill.inspect_notebook(str(notebook)) for notebook in notebooks}
    chosen = {notebook: {"preset": preset} if "preset" in known[notebook] else {} for notebook in notebooks}
    for setting in settings:
        name, equals, word = setting.partition("=")
        if not equals:
            raise LabError(f"'{setting}' is not a parameter: write it as name=value, for example seeds=1.")
        takers = [notebook for notebook in notebooks if name in known[notebook]]
        if not takers:
            names = sorted({name for parameters in known.values() for name in parameters})
            raise LabError(f"No notebook has a parameter '{name}': accepted are {', '.join(names)}.")
        for notebook in takers:
            read, accepted, *_ = KINDS[TYPES.get(known[notebook][name]["inferred_type_name"], str)]  # nothing is run
            try:
                chosen[notebook][name] = read(word)
            except (ValueError, KeyError):
                raise LabError(f"{name}={word}: accepted is {accepted}.") from None
    return chosen


def environment() -> dict[str, str]:
    """That of a kernel or JupyterLab: the runs' home as an absolute path, and no empty token, which lets anybody in."""
    kept = {name: value for name, value in os.environ.items() if name != "JUPYTER_TOKEN" or value}
    return kept | {"FUNLORA_HOME": str(home())}


def execute(preset: str, settings: list[str], only: str | None = None) -> list[Path]:
    """Execute the notebooks for a preset into ``<home>/<preset>-notebooks`` -> the copies; LabError if a cell fails."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    find_preset(preset)
    everything, target = sorted(folder().glob("*.ipynb")), home() / f"{preset}-notebooks"
    notebooks = [path for path in everything if (only or "") in path.name]
    if not notebooks:
        names = ", ".join(path.stem for path in everything)
        raise LabError(f"No notebook's name contains '{only}': accepted are parts of {names}.")
    chosen = assign(notebooks, preset, settings)
    target.mkdir(parents=True, exist_ok=True)
    how = {"kernel_name": "python3", "cwd": folder(), "progress_bar": sys.stderr.isatty()}
    for number, (notebook, parameters) in enumerate(chosen.items(), 1):
        print(f"notebook {number} of {len(chosen)}: {notebook.name}", file=sys.stderr, flush=True)
        copy = target / notebook.name
        try:
            with patch.dict(os.environ, environment()):
                papermill.execute_notebook(notebook, copy, parameters, **how)
        except PapermillExecutionError as reason:
            error = f"{notebook.name} failed in its cell {reason.cell_index}: {reason.ename}: {reason.evalue}"
            raise LabError(f"{error}; the copy with the error is {copy}.") from None
    return [target / notebook.name for notebook in chosen]


def lab_command(port: int, browser: bool, where: Path | None = None) -> list[str]:
    """The words that start JupyterLab, bound to this machine; it makes its own token, so that none is among them."""
    words = [sys.executable, "-m", "jupyterlab", str(where or folder()), f"--ServerApp.ip={ADDRESS}"]
    return [*words, f"--ServerApp.port={port}", *([] if browser else ["--no-browser"])]


def start_lab(port: int = 8888, browser: bool = True) -> int:
    """Start JupyterLab over the same runs as the command and stay until it ends; returns its exit status."""
    if not 1 <= port <= 65535:
        raise LabError(f"port={port}: accepted is a whole number from 1 to 65535.")
    try:
        return subprocess.call(lab_command(port, browser), env=environment())
    except KeyboardInterrupt:
        return 0
