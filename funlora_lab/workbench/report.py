"""A run as one HTML page that needs no network: its results, figures, certificate, settings and provenance.

Everything is inside the file (pictures as data, no script, no link), so it can be mailed and opened anywhere.
"""

import dataclasses
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import pandas as pd

from funlora_lab import __version__
from funlora_lab.certificate import verify
from funlora_lab.config import Experiment
from funlora_lab.disk import write_atomically
from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.studies import pictures
from funlora_lab.workbench import markup, panels, runs

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root{{color-scheme:light dark;--jp-content-font-color1:#222;--jp-content-font-color2:#555;--jp-border-color2:#ccc}}
@media (prefers-color-scheme:dark){{
 :root{{--jp-content-font-color1:#eee;--jp-content-font-color2:#bbb;--jp-border-color2:#555}}body{{background:#151515}}}}
body{{max-width:1000px;margin:24px auto;padding:0 16px}} h1{{font-size:22px}} h2{{font-size:17px;margin-top:28px}}
pre{{white-space:pre-wrap}} .funlora{{font-size:14px}} .wide{{overflow-x:auto}}
</style></head><body>{body}</body></html>
"""


def write(opened: OpenRun, path: Path | None = None) -> Path:
    """Write the report of a finished run (default: ``report.html`` in its folder); returns its path."""
    path = path or opened.run.folder / "report.html"
    if not path.parent.is_dir():
        raise LabError(f"Cannot write {path}: there is no folder {path.parent}.")
    write_atomically(path, page(opened).encode())
    return path


def page(opened: OpenRun) -> str:
    """The whole page as text."""
    e = opened.experiment
    title = f"{e.preset}, {e.method}, seed {e.seed}"
    parts = [
        f"<h1>FunLoRA run: {escape(title)}</h1>",
        f'<p class="soft">{escape(opened.run.folder.name)}</p>',
        _section("Results", markup.table(summary(opened))),
        _section("Accuracy after every task", markup.table(accuracy_table(opened))),
        _section("Classes", markup.table(class_table(opened))),
    ]
    parts += [_section(words, markup.figure(drawn, words)) for words, drawn in _figures(opened)]
    if opened.learner is not None and getattr(opened.learner, "rows", None) and opened.adapters.layers:
        heatmap = panels.layer_heatmap(opened, "change of the weights")
        parts.append(_section("What the adapters change", f'<div class="wide">{heatmap.html}</div>'))
    parts += [
        _section("Certificate of no forgetting", certificate(opened)),
        _section("Settings", _settings(e)),
        _section("Provenance", markup.table(provenance(opened))),
        f'<p class="soft">Written by funlora-lab {__version__} on '
        f"{datetime.now(UTC).isoformat(sep=' ', timespec='seconds')}.</p>",
    ]
    return PAGE.format(title=escape(title), body=str(markup.Markup("".join(parts))))


def _section(title: str, html: str) -> str:
    return f"<h2>{escape(title)}</h2>{html}"


def _figures(opened: OpenRun):
    titles = {
        "samples": "Real images and samples",
        "losses": "Losses",
        "accuracy": "Accuracy",
        "confusion": "Confusion after the last task",
    }
    for name, drawn in pictures.figures(opened).items():
        yield titles.get(name, name.replace("_", " ").capitalize()), drawn


def summary(opened: OpenRun) -> pd.DataFrame:
    """The closing numbers, one line each."""
    r = opened.results
    lines = {
        "LA, accuracy over all classes after the last task": r["LA"],
        "AIA, its mean over the tasks": r["AIA"],
        "upper bound: the classifier trained on all real images": r["upper_bound_real"],
        "recognition of new classes' samples by a classifier of real images": r["recognition"],
        "flow loss on held-out images of new classes": r["flow_loss"],
        "numbers learned for one class (PPC)": f"{r['PPC']:,}",
        "seconds of training, sampling and classifiers": f"{r['seconds']:.1f}",
    }
    shown = {
        name: "not measured" if v is None else v if isinstance(v, str) else f"{v:.4f}" for name, v in lines.items()
    }
    return pd.DataFrame({"": shown})


def accuracy_table(opened: OpenRun) -> pd.DataFrame:
    """a_{k,j} of Eq. 22: one line a task k, one column a task j, and their mean A_k."""
    tasks = range(len(opened.tasks))
    matrix = [[line[j] if j < len(line) else None for j in tasks] for line in opened.results["accuracy"]]
    names = [" ".join(opened.classes[cls] for cls in classes) for classes in opened.tasks]
    heads = [
        f"{j}: {name if len(name) < 25 else f'{len(opened.tasks[j - 1])} classes'}" for j, name in enumerate(names, 1)
    ]
    frame = pd.DataFrame(matrix, index=[f"after task {k + 1}" for k in range(len(matrix))], columns=heads)
    return frame.assign(mean=opened.averages)


def class_table(opened: OpenRun) -> pd.DataFrame:
    """One line a class: task, closing accuracy, recognition and held-out flow loss."""
    r = opened.results
    lines = {}
    for k, classes in enumerate(opened.tasks, 1):
        for cls in classes:
            counts = r["confusion"][cls]
            lines[opened.classes[cls]] = {
                "task": k,
                "accuracy": counts[cls] / max(sum(counts), 1),
                "recognition of samples": r["recognition_per_class"].get(str(cls)),
                "flow loss": r["flow_loss_per_class"].get(str(cls)),
            }
    return pd.DataFrame.from_dict(lines, orient="index")


def certificate(opened: OpenRun) -> str:
    """What verifying the run finds now: a badge, and what is unchanged class by class and task by task."""
    taken = [event for event in opened.events if event["event"] == "certificate"]
    if not taken:
        return "<p>This run stored no certificate.</p>"
    try:
        found = verify(opened.run, opened.runtime.device)
    except LabError as reason:
        return str(markup.problem(reason))
    words = f"{len(found.compared)} comparisons, nothing changed" if found.unchanged else "something changed"
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in found.notes + found.sentences())
    network = taken[-1]["backbone"]["sha256"]
    return (
        f"<p>{markup.badge(found.unchanged, words)}</p>{markup.table(found.table())}{said}"
        f"<p>SHA-256 of the frozen network: <code>{network}</code></p>"
    )


def _settings(experiment: Experiment) -> str:
    command = "funlora run " + " ".join(runs.words(experiment))
    frame = pd.DataFrame({"": {k: str(v) for k, v in dataclasses.asdict(experiment).items()}})
    return (
        f"<p><code>{escape(command)}</code></p><details><summary>all settings</summary>{markup.table(frame)}</details>"
    )


def provenance(opened: OpenRun) -> pd.DataFrame:
    """Where, when and with what the run was made."""
    made = dict(opened.results["provenance"])
    versions = made.pop("versions", {})
    return pd.DataFrame({"": {k: str(v) for k, v in (made | versions).items()}})
