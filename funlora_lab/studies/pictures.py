"""The pictures every run leaves in its folder, and the figures the notebooks keep in the clone."""

import json
import os
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from funlora_lab.disk import write_atomically
from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.store import checkout
from funlora_lab.studies import plots


def figures_folder(preset: str) -> Path:
    """Where notebooks keep figures and results: ``figures/<preset>`` of the clone, or of FUNLORA_FIGURES."""
    chosen = os.environ.get("FUNLORA_FIGURES")
    if not chosen and not checkout():
        raise LabError("There is no clone to keep figures in: set FUNLORA_FIGURES to a folder.")
    folder = (Path(chosen) if chosen else checkout() / "figures") / preset
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(figure: Figure, preset: str, name: str) -> Figure:
    """Save a notebook's figure as ``figures/<preset>/<name>.png`` and hand it back to be shown."""
    figure.savefig(figures_folder(preset) / f"{name}.png")
    return figure


def keep_results(preset: str, name: str, results: list[dict]) -> None:
    """Put results under ``name`` in ``figures/<preset>/results.json``, leaving what other notebooks put there."""
    path = figures_folder(preset) / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = results
    write_atomically(path, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())


UNFINISHED = ".pictures"  # lies in the folder while pictures are drawn


def figures(opened: OpenRun, shown: int = 10) -> dict:
    """name -> Figure: samples beside real images, losses, accuracy per task, confusion matrix."""
    drawn = {}
    names = opened.classes
    everything = [cls for task in opened.tasks for cls in task]
    if opened.learner is not None:
        real = {cls: opened.work.dataset.train.of(cls).pixels[:shown] for cls in everything}
        columns = [("real", real), ("samples", {cls: opened.samples(cls)[:shown] for cls in everything})]
        drawn["samples"] = plots.sample_columns(columns, everything, names)
        losses = opened.losses("adapter")
        if len(losses):
            drawn["losses"] = plots.training_curves(
                {names[cls]: (part["images"], part["loss"]) for cls, part in losses.groupby("class")},
                "Adapters of the later classes",
            )
    if opened.results["LA"] is not None:
        drawn["accuracy"] = plots.accuracy_per_task({opened.experiment.method: opened.averages})
        drawn["confusion"] = plots.confusion(opened.results["confusion"], names)
    return drawn


def stored(folder: Path) -> list[Path]:
    """The pictures in a folder; none when their drawing was broken off."""
    return [] if (folder / UNFINISHED).exists() else sorted(folder.glob("*.png"))


def save(opened: OpenRun, folder: Path | None = None) -> list[Path]:
    """Save every figure of the run as PNG in ``folder`` (default: the run's own); returns their paths."""
    folder = folder or opened.run.folder
    paths = []
    write_atomically(folder / UNFINISHED, b"")
    for name, figure in figures(opened).items():
        paths.append(folder / f"{name}.png")
        content = BytesIO()
        figure.savefig(content, format="png")
        write_atomically(paths[-1], content.getvalue())
    (folder / UNFINISHED).unlink(missing_ok=True)
    return paths
