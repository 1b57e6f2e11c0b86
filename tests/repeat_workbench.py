"""Execute the workbench notebook headless many times and say how many went through: widgets must never hang it.

python tests/repeat_workbench.py COUNT       over a run of the smoke preset; stops at the first failure
"""

import os
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient

from funlora_lab import open_run, preset
from funlora_lab.studies.notebooks import folder as notebooks_folder

PATIENCE = 300  # seconds a cell may take before it counts as hung


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ["FUNLORA_HOME"] = home
        open_run(preset("smoke"), "cpu")
        folder = notebooks_folder()
        for number in range(1, count + 1):
            begun = time.monotonic()
            notebook = nbformat.read(folder / "00_workbench.ipynb", as_version=4)
            for cell in notebook.cells:
                if "parameters" in cell.metadata.get("tags", []):
                    cell.source += '\npreset = "smoke"'
            NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(folder)}}).execute()
            said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
            assert "checked: " in said, said
            print(f"{number} of {count} went through, the last in {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
