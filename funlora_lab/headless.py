"""Executing the notebooks without a person: papermill, with the parameters checked first.

papermill itself only warns of a parameter that a notebook does not have; a typo would then silently run the default.
"""

import ast
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from funlora_lab.errors import LabError
from funlora_lab.presets import preset as find_preset
from funlora_lab.store import checkout, home

Value = int | float | bool | str


def notebooks_folder() -> Path:
    """The folder of the notebooks beside the package; raises LabError when the package was installed without them."""
    folder = checkout() / "notebooks" if checkout() else None
    if folder is None or not folder.is_dir():
        raise LabError(
            "The notebooks are not installed with the package: run from a clone installed with pip install -e."
        )
    return folder


def parameters_of(notebook: Path) -> dict[str, Value]:
    """The parameters of a notebook and their defaults: the literal assignments of its cell tagged ``parameters``."""
    import nbformat

    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return dict(_literals(cell.source, notebook))
    return {}


def _literals(source: str, notebook: Path) -> Iterator[tuple[str, Value]]:
    for node in ast.parse(source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        value = ast.literal_eval(node.value)
        if not isinstance(value, int | float | bool | str):
            raise LabError(f"{notebook.name}: the parameter {target.id} is not a whole number, number, truth or text.")
        yield target.id, value


def parse(name: str, word: str, default: Value) -> Value:
    """The value of ``name=word`` as the type of the parameter's default; never evaluated as code."""
    if isinstance(default, bool):
        if word.lower() not in ("true", "false"):
            raise LabError(f"{name}={word}: accepted is true or false.")
        return word.lower() == "true"
    for kind, accepted in ((int, "a whole number"), (float, "a number")):
        if isinstance(default, kind):
            try:
                return kind(word)
            except ValueError:
                raise LabError(f"{name}={word}: accepted is {accepted}.") from None
    return word


def assign(notebooks: list[Path], preset: str, settings: list[str]) -> dict[Path, dict[str, Value]]:
    """Which notebook gets which parameters; raises LabError for one that no notebook has, before anything runs."""
    known = {notebook: parameters_of(notebook) for notebook in notebooks}
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
            chosen[notebook][name] = parse(name, word, known[notebook][name])
    return chosen


@contextmanager
def _home_for_kernels():
    """Kernels work in another folder: give them this process's home as an absolute path."""
    before = os.environ.get("FUNLORA_HOME")
    os.environ["FUNLORA_HOME"] = str(home())
    try:
        yield
    finally:
        if before is None:
            del os.environ["FUNLORA_HOME"]
        else:
            os.environ["FUNLORA_HOME"] = before


def execute(preset: str, settings: list[str], only: str | None = None) -> list[Path]:
    """Execute the notebooks for a preset into ``<home>/<preset>-notebooks``; returns the executed copies' paths.

    Raises LabError for an unknown preset, notebook or parameter before anything runs, and for a cell that fails.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    find_preset(preset)
    folder = notebooks_folder()
    notebooks = sorted(path for path in folder.glob("*.ipynb") if (only or "") in path.name)
    if not notebooks:
        names = ", ".join(path.stem for path in sorted(folder.glob("*.ipynb")))
        raise LabError(f"No notebook's name contains '{only}': accepted are parts of {names}.")
    chosen = assign(notebooks, preset, settings)
    target = home() / f"{preset}-notebooks"
    target.mkdir(parents=True, exist_ok=True)
    executed = []
    with _home_for_kernels():
        for number, (notebook, parameters) in enumerate(chosen.items(), 1):
            print(f"notebook {number} of {len(chosen)}: {notebook.name}", file=sys.stderr, flush=True)
            copy = target / notebook.name
            try:
                papermill.execute_notebook(
                    notebook, copy, parameters, kernel_name="python3", cwd=folder, progress_bar=sys.stderr.isatty()
                )
            except PapermillExecutionError as reason:
                raise LabError(
                    f"{notebook.name} failed in its cell {reason.cell_index}: {reason.ename}: {reason.evalue}; "
                    f"the copy with the error is {copy}."
                ) from None
            executed.append(copy)
    return executed
