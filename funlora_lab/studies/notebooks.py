"""The notebooks without a person (papermill, with the parameters checked first), and in JupyterLab.

papermill itself only warns of a parameter that a notebook does not have; a typo would then silently run the default.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from funlora_lab.errors import LabError
from funlora_lab.experiment import KINDS, PLACES, place
from funlora_lab.presets import check_parameter, configured, words
from funlora_lab.presets import preset as find_preset
from funlora_lab.store import checkout, home, key_of, locked, safe_name

ADDRESS = "127.0.0.1"
TYPES = {kind.__name__: kind for kind in (int, float, bool, str)}  # that a parameter's annotation may name
FOLDERS = {"FUNLORA_DATA": "data", "FUNLORA_FIGURES": ""}  # variables that name one -> what they are where not set


def folder() -> Path:
    """The folder of the notebooks beside the package; raises LabError when the package was installed without them."""
    if not checkout() or not (checkout() / "notebooks").is_dir():
        raise LabError("The notebooks are not installed: run from a clone of the repository (pip install -e .).")
    return checkout() / "notebooks"


def assign(notebooks: list[Path], preset: str, settings: list[str]) -> dict[Path, dict]:
    """Which notebook gets which parameters; raises LabError for one that no notebook has, before anything runs."""
    import papermill

    known = {}
    for notebook in notebooks:
        with _failing(notebook):
            known[notebook] = papermill.inspect_notebook(_literal(notebook))
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
            check_parameter(name, chosen[notebook][name], type(chosen[notebook][name]))
            if name == "settings":
                configured(preset, word)  # refused here, in the words of the command
                chosen[notebook][name] = shlex.join(map(_placed, words(word)))
            elif name == "inception" and word not in ("", "download"):
                chosen[notebook][name] = str(place(word))
    return chosen


def _placed(setting: str) -> str:
    """A ``key=value`` word, in which a file or folder is named as from anywhere."""
    name, _, word = setting.partition("=")
    return f"{name}={place(word)}" if name in PLACES and word else setting


def _literal(path: Path) -> str:
    """A path for papermill, which takes what stands in braces for a parameter."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def _failing(notebook: Path, copy: Path | None = None) -> Iterator[None]:
    """Whatever goes wrong in papermill, a kernel or a file, in a sentence."""
    from papermill.exceptions import PapermillExecutionError

    try:
        yield
    except LabError:
        raise
    except PapermillExecutionError as reason:
        error = f"{notebook.name} failed in its cell {reason.cell_index}: {reason.ename}: {reason.evalue}"
        raise LabError(f"{error}; the copy with the error is {copy}.") from None
    except Exception as reason:
        words = " ".join([type(reason).__name__, *str(reason).split()])
        raise LabError(f"{notebook.name} could not be read or executed ({words}).") from None


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """The variables of a kernel or JupyterLab, which work in another folder and with this interpreter.

    Every folder they name is an absolute path, ``python3`` is the kernel of this Python, whatever others there are,
    and there is no empty token, which lets anybody in.
    """
    from ipykernel.kernelspec import write_kernel_spec

    kept = {name: value for name, value in os.environ.items() if name != "JUPYTER_TOKEN" or value}
    named = {name: os.environ.get(name) or default for name, default in FOLDERS.items()}
    kept |= {name: str(place(folder)) for name, folder in named.items() if folder} | {"FUNLORA_HOME": str(home())}
    with TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder) / "kernels" / "python3")
        yield kept | {"JUPYTER_PATH": os.pathsep.join(filter(None, (folder, kept.get("JUPYTER_PATH"))))}


def copies(preset: str, settings: list[str]) -> Path:
    """The folder of executed notebooks: named by the preset, and by the parameters given, with a digest of them."""
    words = "-".join([preset, "notebooks", *map(safe_name, sorted(settings))])
    return home() / (f"{words[:80]}-{key_of(sorted(settings))[:8]}" if settings else words)


def execute(preset: str, settings: list[str], only: str | None = None) -> list[Path]:
    """Execute the notebooks for a preset into the folder ``copies`` -> the executed ones; LabError if a cell fails."""
    import papermill

    find_preset(preset)
    everything, target = sorted(folder().glob("*.ipynb")), copies(preset, settings)
    notebooks = [path for path in everything if (only or "") in path.name]
    if not notebooks:
        names = ", ".join(path.stem for path in everything)
        raise LabError(f"No notebook's name contains '{only}': accepted are parts of {names}.")
    chosen = assign(notebooks, preset, settings)
    how = {"kernel_name": "python3", "cwd": folder(), "progress_bar": sys.stderr.isatty()}
    for number, (notebook, parameters) in enumerate(chosen.items(), 1):
        print(f"notebook {number} of {len(chosen)}: {notebook.name}", file=sys.stderr, flush=True)
        copy, given = target / notebook.name, (_literal(notebook), _literal(target / notebook.name), parameters)
        with _failing(notebook, copy), locked(target), environment() as variables, patch.dict(os.environ, variables):
            papermill.execute_notebook(*given, **how)
    return [target / notebook.name for notebook in chosen]


def lab_command(port: int, browser: bool, where: Path | None = None) -> list[str]:
    """The words that start JupyterLab, bound to this machine; it makes its own token, so that none is among them."""
    words = [sys.executable, "-m", "jupyterlab", str(where or folder()), f"--ServerApp.ip={ADDRESS}"]
    return [*words, f"--ServerApp.port={port}", *([] if browser else ["--no-browser"])]


def start_lab(port: int = 8888, browser: bool = True) -> int:
    """Start JupyterLab over the same runs as the command and stay until it ends; returns its exit status."""
    if not 1 <= port <= 65535:
        raise LabError(f"port={port}: accepted is a whole number from 1 to 65535.")
    with environment() as variables, suppress(KeyboardInterrupt):
        return subprocess.call(lab_command(port, browser), env=variables)
    return 0
