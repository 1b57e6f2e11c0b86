"""One small function a subcommand of ``funlora``: it calls the package and prints. Imports are made when needed."""

import dataclasses
import json
import shlex
import signal
import sys
import time
from pathlib import Path

from funlora_lab.config import METHODS, Experiment, override
from funlora_lab.errors import LabError, Stopped
from funlora_lab.presets import PRESETS, preset


def experiment_of(arguments) -> Experiment:
    words = list(arguments.settings)
    words += [f"method={arguments.method}"] if arguments.method is not None else []
    words += [f"seed={arguments.seed}"] if arguments.seed is not None else []
    return override(preset(arguments.preset), words)


def run(arguments) -> None:
    stop = _Stop(arguments.minutes)
    experiment = experiment_of(arguments)
    from funlora_lab import continual, distributed, shares
    from funlora_lab.store import Run
    from funlora_lab.training import Runtime

    runtime = Runtime(
        distributed.own_device(continual.pick_device(arguments.device)), stop, tell=_tell, compile=arguments.compile
    )
    if arguments.repair:
        for finding in Run.of(experiment).repair():
            _tell(f"Deleted: {str(finding).partition(';')[0]}.")
    try:
        if distributed.launched() and not _base_together(experiment, runtime):
            return
        if arguments.classes is not None or arguments.worker is not None:
            _print_share(
                _shown(shares.learn(experiment, runtime, None, arguments.classes, arguments.worker)), arguments
            )
        else:
            _print_result(_shown(continual.run(experiment, runtime)), experiment, runtime, stop.begun, arguments)
    except Stopped as reason:
        if not stop.late:
            raise
        command = shlex.join(["funlora", *arguments.words])
        if arguments.json:
            print(json.dumps({"finished": False, "reason": str(reason), "command": command}))
        else:
            print(f"{reason} Everything is saved; the same command goes on from there:\n  {command}")


def _shown(events) -> dict:
    """Show events as they come; returns the last one."""
    from funlora_lab.progress import Progress

    event = {}
    with Progress(sys.stderr) as progress:
        for event in events:
            progress.show(event)
    return event


def _base_together(experiment: Experiment, runtime) -> bool:
    """Train the base in all processes that torchrun started; true for the one that goes on with the rest alone."""
    from funlora_lab import distributed, shares

    with distributed.team_of(runtime.device) as team:
        events = shares.learn(experiment, dataclasses.replace(runtime, team=team))
        try:
            if team.rank == 0:
                _shown(events)
            for _ in events:
                pass
        except Stopped:
            if team.rank == 0:
                raise
        return team.rank == 0


def _print_share(share: dict, arguments) -> None:
    if arguments.json:
        print(json.dumps(share | {"finished": True}))
    else:
        print(f"Learned {', '.join(share['classes'])} in {share['home']}; `funlora merge` brings them to another home.")


def _print_result(result: dict, experiment: Experiment, runtime, begun: float, arguments) -> None:
    from funlora_lab.opened import OpenRun
    from funlora_lab.store import Run
    from funlora_lab.studies import pictures

    run = Run.of(experiment)
    paths = pictures.stored(run.folder) or pictures.save(OpenRun(run, runtime))
    if arguments.json:
        keys = "preset method seed LA AIA PPC recognition flow_loss seconds run".split()
        print(json.dumps({key: result[key] for key in keys} | {"finished": True}))
    else:
        print(closing_table(result))
        print(f"\nPictures: {', '.join(path.name for path in paths)} in {run.folder}")
        print(f"This call took {time.monotonic() - begun:.1f} s.")


def merge(arguments) -> None:
    from funlora_lab import shares

    facts = shares.merge([Path(folder).expanduser() for folder in arguments.folders])
    if arguments.json:
        print(json.dumps(facts))
        return
    brought = ", ".join(f"{count} {kind}" for kind, count in facts["brought"].items()) or "nothing new"
    print(f"Brought to {facts['home']}: {brought}; {facts['known']} files were here already.")
    if facts["unfinished"]:
        print(f"{facts['unfinished']} unfinished artefacts were left out: finish their shares and merge again.")


def verify(arguments) -> int:
    from funlora_lab.certificate import verify
    from funlora_lab.continual import pick_device
    from funlora_lab.store import Run

    report = verify(Run.at(arguments.run), pick_device(arguments.device))
    if arguments.json:
        print(json.dumps(report.json()))
    else:
        print(report.table().to_string())
        for sentence in report.notes + report.sentences():
            print(sentence)
        print(
            f"{len(report.compared)} comparisons: " + ("nothing changed." if report.unchanged else "SOMETHING CHANGED.")
        )
    return 0 if report.unchanged else 1


def _measured(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def bench(arguments) -> None:
    experiment = experiment_of(arguments)
    from funlora_lab import bench
    from funlora_lab.continual import pick_device
    from funlora_lab.training import Runtime

    runtime = Runtime(device=pick_device(arguments.device), compile=arguments.compile, save_seconds=float("inf"))
    result = bench.measure(
        experiment, runtime, arguments.batch, arguments.repeats, say=lambda what: print(f"{what} ...", file=sys.stderr)
    )
    print(json.dumps(result) if arguments.json else bench.table(result))


def closing_table(result: dict) -> str:
    """The closing lines of a run, aligned."""
    rows = [
        ("method", result["method"]),
        ("LA", f"{_measured(result['LA'])}   accuracy over all classes after the last task"),
        ("AIA", f"{_measured(result['AIA'])}   its mean over the tasks"),
        ("PPC", f"{result['PPC']:,}   numbers learned for one class"),
        (
            "recognition",
            f"{_measured(result['recognition'])}   share of new classes' samples that a real-data judge knows",
        ),
        ("flow loss", f"{_measured(result['flow_loss'])}   on held-out images of new classes"),
        ("seconds", f"{result['seconds']:.1f}   training, sampling and classifiers, whenever they ran"),
        ("run", result["run"]),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _tell(sentence: str) -> None:
    print(f"funlora: {sentence}", file=sys.stderr, flush=True)


class _Stop:
    """Asked before every step: the sentence that says why to stop now, else None.

    Reasons are SIGTERM, the first Ctrl-C (a second one stops at once) and that the minutes are over.
    """

    def __init__(self, minutes: float | None):
        self.begun, self.minutes, self.asked = time.monotonic(), minutes, False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def late(self) -> bool:
        return self.minutes is not None and not self.asked and time.monotonic() - self.begun >= 60 * self.minutes

    def __call__(self) -> str | None:
        if self.asked:
            return "Asked to stop; everything is saved and the same command resumes the run."
        return f"Stopped after {self.minutes:g} minutes, as asked." if self.late else None


def quality(arguments) -> None:
    from funlora_lab.opened import open_folder
    from funlora_lab.studies import fidelity, quality

    for name in ("draws", "images"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise LabError(f"--{name} {getattr(arguments, name)}: accepted is a whole number from 1 up.")
    opened = open_folder(arguments.run, arguments.device)
    tables = {}
    if arguments.inception:
        weights = None if arguments.inception == "download" else arguments.inception
        tables["inception"] = fidelity.inception_quality(
            opened, weights, arguments.split, arguments.images, arguments.draws
        )
    tables = {"classifier features": quality.classifier_quality(opened, arguments.draws, arguments.split)} | tables
    if arguments.json:
        print(json.dumps({name: table.to_dict("records") for name, table in tables.items()}))
        return
    for name, table in tables.items():
        print(f"{name} ({opened.run.folder.name})\n{quality.wide(table).to_string()}\n")


def listing(arguments) -> None:
    from funlora_lab.store import home

    print("presets   " + ", ".join(PRESETS))
    print("methods   " + ", ".join(METHODS))
    print("settings  (of the preset digits)")
    for field in dataclasses.fields(Experiment):
        print(f"  {field.name} = {getattr(PRESETS['digits'], field.name)}")
    print(f"runs in {home()}")
    for config in sorted(home().glob("*/config.json")):
        results = config.with_name("results.json")
        if results.exists():
            found = json.loads(results.read_text())
            print(f"  {config.parent.name}  LA {_measured(found['LA'])}  AIA {_measured(found['AIA'])}")
        else:
            print(f"  {config.parent.name}  unfinished")


def ledger(arguments) -> None:
    from funlora_lab.studies import ledger

    table = ledger.of_preset(arguments.preset) if arguments.preset else ledger.of_paper()
    print(table.to_json(orient="records", indent=1) if arguments.json else ledger.text(table))


def export(arguments) -> None:
    from funlora_lab.opened import open_folder

    opened = open_folder(arguments.run, "cpu")
    cls = opened.class_of(arguments.cls)
    path = opened.export_class(cls, Path(arguments.to or f"class-{cls}.safetensors"))
    print(f"Class {opened.known[cls]} is in {path}, {path.stat().st_size:,} bytes.")


def bring(arguments) -> None:
    from funlora_lab.opened import open_folder

    opened = open_folder(arguments.run, "cpu")
    cls = opened.import_class(Path(arguments.file))
    print(f"Class {opened.known[cls]} (index {cls}) is now in {opened.run.folder}.")


def remove(arguments) -> None:
    from funlora_lab.opened import open_folder

    opened = open_folder(arguments.run, "cpu")
    cls = opened.class_of(arguments.cls)
    name = opened.known[cls]
    opened.remove_class(cls)
    print(f"Class {name} (index {cls}) is no longer in {opened.run.folder}; its training stays in the store.")


def sweep(arguments) -> None:
    from funlora_lab.studies import designs, sweeps, tables

    if arguments.seeds < 1:
        raise LabError(f"seeds={arguments.seeds}: accepted is a whole number from 1 up.")
    base = designs.base_of(arguments.preset, arguments.settings)
    wanted = designs.rows(designs.cells(arguments.tables.split(","), base, range(arguments.seeds)), arguments.rows)
    print(sweeps.status(wanted).to_string(), flush=True)
    if arguments.plan:
        print(f"What remains takes about {sweeps.estimate(wanted, arguments.device):.0f} s.")
        return
    sweeps.perform(wanted, arguments.device, show=print, each=lambda line: print(" ", line, flush=True))
    for name, table in sweeps.summary(sweeps.collect(wanted)).groupby(level=0, sort=False):
        print(f"\n{name}\n{tables.readable(table).to_string()}")


def notebooks(arguments) -> None:
    from funlora_lab.headless import execute

    for path in execute(arguments.preset, arguments.settings, arguments.only):
        print(path)


def lab(arguments) -> int:
    from funlora_lab import lab

    return lab.start(arguments.port, not arguments.no_browser)


def report(arguments) -> None:
    from funlora_lab.opened import open_folder
    from funlora_lab.workbench import report

    print(report.write(open_folder(arguments.run), Path(arguments.to).absolute() if arguments.to else None))
