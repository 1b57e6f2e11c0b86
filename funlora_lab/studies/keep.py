"""What notebooks keep in the clone (figures, tables in three forms, results), and the pictures every run leaves."""

import io
import os
import re
from contextlib import suppress
from pathlib import Path

import pandas as pd
from PIL import Image
from torch import Tensor

from funlora_lab.adapters import METHODS
from funlora_lab.continual import OpenRun, average_accuracies
from funlora_lab.data import data_root
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment, place
from funlora_lab.presets import PRESETS
from funlora_lab.store import UNFINISHED, checkout, key_of, make_folder, update_json, write_atomically
from funlora_lab.studies import plots, sweeps
from funlora_lab.training import Event, Watch


def folder_name(experiment: Experiment) -> str:
    """An experiment's folder of figures: its preset, with a digest of changed settings beyond seed and method.

    Where a data set lies does not count, but for pictures of one's own, which are another data set in every folder.
    """
    changed = experiment.unlike(PRESETS[experiment.preset])
    changed = {name: value for name, value in changed.items() if name not in ("seed", "method", "data_root")}
    changed |= {"data_root": str(data_root(experiment))} if experiment.data == "folder" else {}
    return experiment.preset.removesuffix("-small") + (f"-{key_of(changed)[:8]}" if changed else "")


def folder(experiment: Experiment) -> Path:
    """Where notebooks keep figures and results: ``figures/<folder_name>`` of the clone, or of FUNLORA_FIGURES."""
    clone, chosen = checkout(), os.environ.get("FUNLORA_FIGURES")
    if not chosen and not clone:
        raise LabError("There is no clone to keep figures in: set FUNLORA_FIGURES to a folder.")
    path = place(chosen or clone / "figures") / folder_name(experiment)
    make_folder(path)
    return path


def figure(drawn: plots.Drawing, experiment: Experiment, name: str) -> plots.Drawing:
    """Save a notebook's figure as ``<name>.png`` in the experiment's folder of figures; hand it back to be shown."""
    write_atomically(folder(experiment) / f"{name}.png", drawn.png())
    return drawn


def results(experiment: Experiment, name: str, records: list[dict]) -> None:
    """Put results under ``name`` in the folder's ``results.json``, leaving what other notebooks put there."""
    update_json(folder(experiment) / "results.json", lambda known: known | {name: records})


def scores(runs: dict[str, OpenRun]) -> pd.DataFrame:
    """What runs reported, by name, as text: a PPC only where a class has numbers of its own, and no empty numbers."""
    digits = {"LA": 4, "AIA": 4, "recognition": 4, "flow_loss": 4, "seconds": 0}
    lines = {}
    for name, run in runs.items():
        r = run.results
        known = {m: sweeps.NOT_MEASURED if r[m] is None else f"{r[m]:.{n}f}" for m, n in digits.items()}
        lines[name] = {"PPC": f"{r['PPC']:,}" if run.experiment.method in METHODS else "all weights"} | known
    return pd.DataFrame(lines).T


def table(frame: pd.DataFrame, experiment: Experiment, name: str, caption: str) -> pd.DataFrame:
    """Save a table as ``<name>.md``, ``.csv`` and ``.tex`` in the experiment's folder of figures; hand it back."""
    caption += " ±: standard deviation over seeds." if "±" in frame.to_csv() else ""
    for ending, text in (("md", markdown(frame, caption)), ("csv", frame.to_csv()), ("tex", latex(frame, caption))):
        write_atomically(folder(experiment) / f"{name}.{ending}", text.encode())
    return frame


def markdown(frame: pd.DataFrame, caption: str) -> str:
    head = [frame.index.name or "", *frame.columns]
    lines = [head, ["---"] * len(head), *frame.astype(object).fillna("").reset_index().to_numpy()]
    return "\n".join(
        [caption, "", *("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines), ""]
    )


def latex(frame: pd.DataFrame, caption: str) -> str:
    r"""A ``tabular`` inside a ``table``, ready for ``\input``."""
    columns, caption = "l" + "r" * len(frame.columns), re.sub(r"([&%#_$])", r"\\\1", caption)
    shown = frame.astype(object).fillna("").astype(str).reset_index(names=frame.index.name or "")
    text = shown.to_latex(index=False, escape=True, caption=caption, column_format=columns)
    text = re.sub(r"\\(top|mid|bottom)rule", r"\\hline", text.replace(r"\caption", "\\centering\n\\caption", 1))
    return text.replace("±", r"$\pm$")


def looks(folder: Path) -> Watch:
    """Keeps what is drawn in a run's training as ``training/<stage>-<first class>-<step>.png`` in the run's folder."""

    def keep(event: Event, images: Tensor) -> None:
        make_folder(folder / "training")
        name, png = "-".join(map(str, [event["stage"], *event["classes"][:1], f"{event['step']:07}"])), io.BytesIO()
        Image.fromarray(plots.tile(images, len(images)).squeeze()).save(png, "png")
        write_atomically(folder / "training" / f"{name}.png", png.getvalue())

    return keep


def pictures(run: OpenRun, shown: int = 10) -> dict[str, plots.Drawing]:
    """name -> Drawing: samples beside real images, losses, accuracy per task, confusion matrix."""
    drawn, names, order = {}, run.classes, run.order
    if run.generator.draws:
        columns = [("samples", {cls: run.samples(cls, shown) for cls in order})]
        with suppress(LabError):  # the real images are not there any more, or others are
            columns.insert(0, ("real", {cls: run.context.dataset.train.of(cls).pixels[:shown] for cls in order}))
        drawn["samples"] = plots.sample_columns(columns, order, names)
        if len(losses := run.losses("adapter")):
            lines = {names[cls]: (part["images"], part["loss"]) for cls, part in losses.groupby("class")}
            drawn["losses"] = plots.training_curves(lines, "Adapters of the later classes")
    if run.results["LA"] is not None:
        averages = average_accuracies(run.results["accuracy"])
        drawn["accuracy"] = plots.accuracy_per_task({"": {run.experiment.method: averages}})
        drawn["confusion"] = plots.confusion(run.results["confusion"], names)
    return drawn


def samples_after_every_task(run: OpenRun, count: int = 4) -> plots.Drawing:
    """The same noise of every class after every task, of at most a dozen classes: what was learned first stays.

    Above them real images, where the data set is still there.
    """
    after = {f"after task {k}": run.samples_after(k, count) for k in range(1, len(run.tasks) + 1)}
    order = run.context.classes[:12]
    columns = list(after.items())
    with suppress(LabError):
        columns.insert(0, ("real", {cls: run.context.dataset.train.of(cls).pixels[:count] for cls in order}))
    return plots.sample_columns(columns, order, run.classes)


def accuracy_table(run: OpenRun) -> pd.DataFrame:
    """a_{k,j} of Eq. 22: one line a task k, one column a task j, and their mean A_k; nan where nothing was scored."""
    matrix, names = run.results["accuracy"], [" ".join(run.classes[cls] for cls in classes) for classes in run.tasks]
    short = [name if len(name) < 25 else f"{len(task)} classes" for name, task in zip(names, run.tasks, strict=True)]
    heads = [f"{k}: {name}" for k, name in enumerate(short, 1)]
    lines = [dict(zip(heads, line or (), strict=False)) for line in matrix]
    frame = pd.DataFrame(lines, [f"after task {k}" for k in range(1, len(lines) + 1)], heads, float)
    return frame.assign(mean=pd.Series(average_accuracies(matrix), frame.index, float))


def class_table(run: OpenRun) -> pd.DataFrame:
    """One line a class: task, closing accuracy, recognition and held-out flow loss."""
    tasks = {run.classes[cls]: k for k, classes in enumerate(run.tasks, 1) for cls in classes}
    frame = pd.DataFrame({"task": tasks, "accuracy": run.class_accuracies}, tasks)
    names = {"recognition of samples": "recognition_per_class", "flow loss": "flow_loss_per_class"}
    found = {words: {run.classes[int(c)]: v for c, v in run.results[name].items()} for words, name in names.items()}
    return frame.assign(**{words: pd.Series(values, dtype=float) for words, values in found.items()})


def save_pictures(run: OpenRun) -> list[Path]:
    """Save every picture of a run as PNG in its folder; returns their paths."""
    path = run.run.folder
    write_atomically(path / UNFINISHED, b"")
    for name, drawn in pictures(run).items():
        write_atomically(path / f"{name}.png", drawn.png())
    (path / UNFINISHED).unlink(missing_ok=True)
    return run.run.pictures
