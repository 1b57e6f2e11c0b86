"""The pictures every run leaves in its folder, and the figures the notebooks keep in the clone."""

import json
import os
from pathlib import Path

from funlora_lab.config import Experiment
from funlora_lab.disk import write_atomically
from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.presets import PRESETS
from funlora_lab.store import checkout, key_of
from funlora_lab.studies import plots
from funlora_lab.studies.plots import Drawing


def place(experiment: Experiment) -> str:
    """The name of an experiment's folder of figures: its preset, and a digest of what was changed of it, if anything.

    A small variant keeps its tables beside the figures of its preset. Seed and method are named in the figures, and
    where images lie is no change.
    """
    changed = experiment.unlike(PRESETS[experiment.preset])
    for name in ("seed", "method", "data", "data_root"):
        changed.pop(name, None)
    name = experiment.preset.removesuffix("-small")
    return f"{name}-{key_of(changed)[:8]}" if changed else name


def figures_folder(experiment: Experiment) -> Path:
    """Where notebooks keep figures and results: ``figures/<place>`` of the clone, or of FUNLORA_FIGURES."""
    chosen = os.environ.get("FUNLORA_FIGURES")
    if not chosen and not checkout():
        raise LabError("There is no clone to keep figures in: set FUNLORA_FIGURES to a folder.")
    folder = (Path(chosen) if chosen else checkout() / "figures") / place(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(figure: Drawing, experiment: Experiment, name: str) -> Drawing:
    """Save a notebook's figure as ``<name>.png`` in the experiment's folder of figures; hand it back to be shown."""
    write_atomically(figures_folder(experiment) / f"{name}.png", figure.png())
    return figure


def keep_results(experiment: Experiment, name: str, results: list[dict]) -> None:
    """Put results under ``name`` in the folder's ``results.json``, leaving what other notebooks put there."""
    path = figures_folder(experiment) / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = results
    write_atomically(path, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())


UNFINISHED = ".pictures"  # lies in the folder while pictures are drawn


def figures(opened: OpenRun, shown: int = 10) -> dict[str, Drawing]:
    """name -> Drawing: samples beside real images, losses, accuracy per task, confusion matrix."""
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
        write_atomically(paths[-1], figure.png())
    (folder / UNFINISHED).unlink(missing_ok=True)
    return paths
