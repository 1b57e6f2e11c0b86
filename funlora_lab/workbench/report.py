"""A run as one HTML page (no script, no link, no network): results, figures, certificate, settings, provenance."""

import shlex
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from funlora_lab import __version__
from funlora_lab.continual import OpenRun
from funlora_lab.errors import LabError
from funlora_lab.experiment import shown
from funlora_lab.presets import PRESETS
from funlora_lab.store import write_atomically
from funlora_lab.studies import keep
from funlora_lab.studies.verification import verify
from funlora_lab.workbench import markup
from funlora_lab.workbench.layers import AdaptedLayers
from funlora_lab.workbench.progress import measured
from funlora_lab.workbench.runs import arguments

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root{{color-scheme:light dark;--jp-content-font-color1:#222}}
@media (prefers-color-scheme:dark){{
 :root{{--jp-content-font-color1:#eee;--jp-border-color1:#555}}body{{background:#151515}}}}
body{{max-width:1000px;margin:24px auto;padding:0 16px}} h1{{font-size:22px}} h2{{font-size:17px;margin-top:28px}}
.funlora{{font-size:14px;overflow-wrap:anywhere}}</style></head><body>{body}</body></html>
"""

TITLES = {"samples": "Real images and samples", "confusion": "Confusion after the last task, in images"}
SUMMARY = {
    "LA": "LA, accuracy over all classes after the last task",
    "AIA": "AIA, its mean over the tasks",
    "own_LA": "LA of the system's own classifier",
    "own_AIA": "AIA of the system's own classifier",
    "upper_bound_real": "upper bound: the classifier trained on all real images",
    "recognition": "recognition of new classes' samples by a classifier of real images",
    "flow_loss": "flow loss on held-out images of new classes",
}


def write(run: OpenRun, path: Path | None = None) -> Path:
    """Write the report of a finished run (default: ``report.html`` in its folder); returns its path."""
    path = path or run.run.folder / "report.html"
    if not path.parent.is_dir():
        raise LabError(f"Cannot write {path}: there is no folder {path.parent}.")
    write_atomically(path, page(run).encode())
    return path


def page(run: OpenRun) -> str:
    e, r = run.experiment, run.results
    title, now = f"{e.preset}, {e.method}, seed {e.seed}", datetime.now(UTC).isoformat(" ", "seconds")
    summary = {words: measured(r[name]) for name, words in SUMMARY.items() if name in r}
    summary["numbers learned for one class (PPC)"] = f"{r['PPC']:,}"
    summary["seconds of training, sampling and classifiers"] = f"{r['seconds']:.1f}"
    sections = {"Results": markup.table(summary), "Accuracy after every task": markup.table(keep.accuracy_table(run))}
    sections["Classes"] = markup.table(keep.class_table(run))
    try:
        len(run.context.dataset.test)
    except LabError as reason:  # without the real images all else can be shown
        sections["Images"] = f"<p>{escape(str(reason))}</p>"
    drawn = {TITLES.get(name, name.capitalize()): one for name, one in keep.pictures(run).items()}
    if run.generator.draws:
        drawn["Samples after every task"] = keep.samples_after_every_task(run)
    sections |= {words: markup.figure(one, words) for words, one in drawn.items()}
    if run.generator.rows:
        with suppress(LabError):  # of a method that changes inputs, not weights
            sections["What the adapters change"] = AdaptedLayers(run).heatmap("change of the weights").html
    command = shlex.join(["funlora", *arguments(e)]) if e.preset in PRESETS else "no preset of this name is known here"
    settings = markup.table({name: shown(value) for name, value in e.flat.items()})
    sections["Certificate of no forgetting"] = certificate(run)
    sections["Settings"] = f"<p><code>{escape(command)}</code></p><details><summary>all</summary>{settings}</details>"
    made = {"versions": {}, "data": {}} | r["provenance"]
    made |= made.pop("versions") | {f"data, {name}": value for name, value in made.pop("data").items() if value}
    sections["Provenance"] = markup.table({name: str(value) for name, value in made.items()})
    parts = [f"<h2>{escape(name)}</h2><div class='wide'>{html}</div>" for name, html in sections.items()]
    head = f'<h1>FunLoRA run: {escape(title)}</h1><p class="soft">{escape(run.run.folder.name)}</p>'
    foot = f'<p class="soft">Written by funlora-lab {__version__} on {now}.</p>'
    return PAGE.format(title=escape(title), body=str(markup.Markup("".join([head, *parts, foot]))))


def certificate(run: OpenRun) -> str:
    """What verifying the run finds now: a badge, and what is unchanged class by class and task by task."""
    taken = [event for event in run.events if event["event"] == "certificate"]
    if not taken:
        return "<p>This run stored no certificate.</p>"
    try:
        found = verify(run.run, run.runtime.device)
    except LabError as reason:
        return markup.problem(reason)
    words = f"{len(found.compared)} comparisons, nothing changed" if found.unchanged else "something changed"
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in found.notes + found.sentences())
    network = f"<p>SHA-256 of the frozen network: <code>{taken[-1]['backbone']['sha256']}</code></p>"
    return f"<p>{markup.badge(found.unchanged, words)}</p>{markup.table(found.table())}{sentences}{network}"
