"""The pictures every run leaves in its folder."""

from pathlib import Path

from funlora_lab import plots
from funlora_lab.opened import OpenRun


def figures(opened: OpenRun, shown: int = 10) -> dict:
    """name -> Figure: samples beside real images, losses, accuracy per task, confusion matrix."""
    drawn = {}
    names = opened.classes
    everything = [cls for task in opened.tasks for cls in task]
    if opened.learner is not None:
        rows = [
            (names[cls], opened.work.dataset.train.of(cls).pixels[:shown], opened.samples(cls)[:shown])
            for cls in everything
        ]
        drawn["samples"] = plots.sample_grid(rows)
        losses = opened.losses("adapter") if "PPC" in opened.results and hasattr(opened.learner, "rows") else None
        if losses is not None and len(losses):
            drawn["losses"] = plots.training_curves(
                {names[cls]: (part["images"], part["loss"]) for cls, part in losses.groupby("class")},
                "Adapters of the later classes",
            )
    drawn["accuracy"] = plots.accuracy_per_task({opened.experiment.method: opened.averages})
    drawn["confusion"] = plots.confusion(opened.results["confusion"], names)
    return drawn


def save(opened: OpenRun, folder: Path | None = None) -> list[Path]:
    """Save every figure of the run as PNG in ``folder`` (default: the run's own); returns their paths."""
    folder = folder or opened.run.folder
    paths = []
    for name, figure in figures(opened).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths
