"""One small function a subcommand of ``funlora``: it calls the package and prints. Imports are made when needed."""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
import traceback
import types
from functools import partial
from pathlib import Path

import funlora_lab
from funlora_lab.errors import LabError, Stopped
from funlora_lab.experiment import Experiment, override, place, shown
from funlora_lab.presets import PRESETS, preset
from funlora_lab.workbench.progress import Progress, measured


def execute(*files: str | Path) -> types.ModuleType | None:
    """Execute Python files, which may import their neighbours -> the last one's module; LabError says what fails."""
    module = None
    for file in files:
        path = place(file)
        module = sys.modules[str(path)] = types.ModuleType(str(path))
        module.__file__ = str(path)
        sys.path += [str(path.parent)] * (str(path.parent) not in sys.path)
        try:
            exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
        except (Exception, SystemExit) as reason:
            line = [frame.lineno for frame in traceback.extract_tb(reason.__traceback__) if frame.filename == str(path)]
            where = f"{file}, line {line[-1]}" if line else f"{file}"
            raise LabError(f"{where}: {' '.join([type(reason).__name__, *str(reason).split()])}") from None
    return module


def experiment_of(arguments) -> Experiment:
    """The preset with all settings of the command line."""
    named = [f"{name}={vars(arguments)[name]}" for name in ("method", "seed") if vars(arguments)[name] is not None]
    return override(preset(arguments.preset), arguments.settings + named)


def tell(sentence: str) -> None:
    print(f"funlora: {sentence}", file=sys.stderr, flush=True)


class Stop:
    """Asked after every step: the sentence that says why to stop (SIGTERM, Ctrl-C, minutes being over), else None."""

    def __init__(self, minutes: float | None):
        self.begun, self.minutes, self.asked, self.late = time.monotonic(), minutes, False, False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends the process

    def __call__(self) -> str | None:
        if self.asked:
            return "Asked to stop; everything is saved and the same command resumes the run."
        self.late = self.minutes is not None and time.monotonic() - self.begun >= 60 * self.minutes
        return f"Stopped after {self.minutes:g} minutes, as asked." if self.late else None


def run(arguments) -> None:
    stop, experiment = Stop(arguments.minutes), experiment_of(arguments)
    from funlora_lab import store

    record = store.Run.of(experiment)
    try:
        with contextlib.closing(Progress()) as progress:
            result = _stored(record, arguments, progress) or _made(record, arguments, progress, stop)
            if result is None:
                return
    except Stopped as reason:
        if not stop.late:
            raise
        said = {"finished": False, "reason": str(reason), "command": shlex.join(["funlora", *arguments.words])}
        text = f"{reason} Everything is saved; the same command goes on from there:\n  {said['command']}"
        return print(json.dumps(said) if arguments.json else text)
    if arguments.json:
        keys = "preset method seed LA AIA PPC recognition flow_loss seconds run".split()
        return print(json.dumps({key: result[key] for key in keys} | {"finished": True}))
    print(closing_table(result))
    print(f"\nPictures: {', '.join(path.name for path in record.pictures)} in {record.folder}")
    print(f"This call took {time.monotonic() - stop.begun:.1f} s.")


def _stored(record, arguments, progress: Progress) -> dict | None:
    """The results of a run that is finished, pictures and all, shown without importing PyTorch; else None."""
    e, together = record.experiment, "LOCAL_RANK" in os.environ  # one of several processes, which wait for one another
    changing = e.data == "folder" or e.pretrain_root or e.base_weights  # compared with what the run was made of
    if arguments.repair or changing or arguments.files or together:
        return None
    record.check()
    return record.replay(progress) if record.results() and record.pictures else None


def _made(record, arguments, progress: Progress, stop: Stop) -> dict | None:
    """The results of a run, what is missing of it made now; None in all processes of torchrun but the first."""
    from funlora_lab import cluster, continual, training
    from funlora_lab.studies import keep

    device, first = training.own_device(training.pick_device(arguments.device)), os.environ.get("RANK", "0") == "0"
    watch = keep.looks(record.folder) if arguments.watch else None
    runtime = training.Runtime(device, stop, report=progress, tell=tell, watch=watch)
    for finding in record.repair() if arguments.repair and first else []:
        tell(f"Deleted: {str(finding).partition(';')[0]}.")
    if training.launched():  # all train the base; then, or to say why they stop, the first one goes on alone
        with contextlib.nullcontext() if first else contextlib.suppress(Stopped), training.team_of(device) as team:
            report = progress if first else training.ignore
            continual.learn_base(record.experiment, dataclasses.replace(runtime, team=team, report=report))
        if not first:
            return None
    cluster.do([record.experiment], arguments.device, None, runtime, partial(execute, *arguments.files))
    result = continual.run(record.experiment, runtime=runtime)
    if not record.pictures:
        keep.save_pictures(continual.OpenRun(record, runtime))
    return result


def aligned(rows: dict[str, str]) -> str:
    """Names and texts in two columns, one pair a line."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows.items())


def closing_table(r: dict) -> str:
    """The closing lines of a run."""
    rows = {
        "method": r["method"],
        "LA": f"{measured(r['LA'])}   accuracy over all classes after the last task",
        "AIA": f"{measured(r['AIA'])}   its mean over the tasks",
        **({"own LA": f"{measured(r['own_LA'])}   the same of its own classifier"} if "own_LA" in r else {}),
        "PPC": f"{r['PPC']:,}   numbers learned for one class",
        "recognition": f"{measured(r['recognition'])}   share of new classes' samples that a real-data judge knows",
        "flow loss": f"{measured(r['flow_loss'])}   on held-out images of new classes",
        "seconds": f"{r['seconds']:.1f}   training, sampling and classifiers, whenever they ran",
        "run": r["run"],
    }
    return aligned(rows)


def verify(arguments) -> int:
    from funlora_lab import store, training

    found = funlora_lab.verify(store.Run.at(arguments.run), training.pick_device(arguments.device))
    said = [found.table().to_string(), *found.notes, *found.sentences()]
    said += [f"{len(found.compared)} comparisons: {'nothing changed' if found.unchanged else 'SOMETHING CHANGED'}."]
    print(json.dumps(found.json()) if arguments.json else "\n".join(said))
    return 0 if found.unchanged else 1


def bench(arguments) -> None:
    from funlora_lab import store, training

    if store.checkout() is None:
        raise LabError("The benchmark comes with a clone: run it from one, installed with pip install -e.")
    benchmark = execute(store.checkout() / "tests" / "benchmark.py")
    runtime = training.Runtime(training.pick_device(arguments.device))
    given = (experiment_of(arguments), runtime, arguments.batch, arguments.repeats)
    result = benchmark.measure(*given, tell=tell, row=lambda row: arguments.json and print(json.dumps(row), flush=True))
    print(json.dumps(result) if arguments.json else benchmark.table(result))


def quality(arguments) -> None:
    from funlora_lab.studies import fidelity, quality

    run, weights, tables = funlora_lab.open_folder(arguments.run, arguments.device), arguments.inception, {}
    with contextlib.closing(Progress()) as run.runtime.report:
        tables["classifier features"] = quality.classifier_quality(run, arguments.draws, arguments.split)
        if weights:
            more = (arguments.split, arguments.images, arguments.draws)
            tables["inception"] = fidelity.inception_quality(run, None if weights == "download" else weights, *more)
    if arguments.json:
        return print(json.dumps({name: table.to_dict("records") for name, table in tables.items()}))
    for name, table in tables.items():
        print(f"{name} ({run.run.folder.name})\n{quality.wide(table).to_string()}\n")


def listing(arguments) -> None:
    from funlora_lab import data, flow, store, systems

    runs = {}
    for line in store.listing():
        scores = [f"{name} {measured(line['results'].get(name))}" for name in ("LA", "AIA") if line["results"]]
        runs[line["name"]] = "  ".join(scores) or line["state"]
    tables = {
        "presets": {name: f"{e.data}, tasks {e.split}, {e.base.images:,} images" for name, e in PRESETS.items()},
        "methods and systems (method=NAME)": systems.all_methods(),
        "solvers (solver=NAME)": flow.SOLVERS,
        "data sources (data=NAME)": {name: source.about for name, source in data.SOURCES.items()},
        "settings of the preset digits": {name: shown(value) for name, value in PRESETS["digits"].flat.items()},
        f"runs in {store.home()}": runs,
    }
    print("\n\n".join(f"{title}\n{aligned(rows)}" for title, rows in tables.items()))


def ledger(arguments) -> None:
    from funlora_lab.studies import ledger

    table = ledger.of_preset(arguments.preset) if arguments.preset else ledger.of_paper()
    print(table.to_json(orient="records", indent=1) if arguments.json else ledger.text(table))


def export(arguments) -> None:
    run = funlora_lab.open_folder(arguments.run, "cpu")
    cls = run.class_of(arguments.cls)
    path = run.export_class(cls, place(arguments.to or f"class-{cls}.safetensors"))
    print(f"Class {run.known[cls]} is in {path}, {path.stat().st_size:,} bytes.")


def bring(arguments) -> None:
    run = funlora_lab.open_folder(arguments.run, "cpu")
    cls = run.import_class(place(arguments.file))
    print(f"Class {run.known[cls]} (index {cls}) is in {run.run.folder}.")


def remove(arguments) -> None:
    run = funlora_lab.open_folder(arguments.run, "cpu")
    cls, known = run.class_of(arguments.cls), run.known
    run.remove_class(cls)
    back = shlex.join(["funlora", "import", arguments.run, str(run.removed_file(cls))])
    print(f"Class {known[cls]} (index {cls}) is taken out of {run.run.folder}; back it comes with\n  {back}")


def sweep(arguments) -> None:
    from funlora_lab.studies import sweeps, tables

    base = tables.base_of(arguments.preset, arguments.settings)
    wanted = tables.cells(arguments.tables.split(","), base, range(arguments.seeds), arguments.rows)
    print(sweeps.status(wanted).to_string(), flush=True)
    if arguments.gpus:
        return print(sweeps.on_gpus(sweeps.missing(wanted), arguments.gpus))
    if arguments.plan:
        return print(f"What remains takes about {sweeps.estimate(wanted, arguments.device):.0f} s.")
    prepare, each = partial(execute, *arguments.files), lambda line: print(" ", line, flush=True)
    with contextlib.closing(Progress()) as progress:
        sweeps.perform(wanted, arguments.device, None, print, each, prepare, progress)
    for name, table in sweeps.summary(sweeps.collect(wanted)).groupby(level=0, sort=False):
        print(f"\n{name}\n{sweeps.readable(table).to_string()}")


def notebooks(arguments) -> None:
    from funlora_lab.studies.notebooks import execute

    print(*execute(arguments.preset, arguments.settings, arguments.only), sep="\n")


def lab(arguments) -> int:
    from funlora_lab.studies.notebooks import start_lab

    return start_lab(arguments.port, not arguments.no_browser)


def report(arguments) -> None:
    from funlora_lab.workbench import report

    run = funlora_lab.open_folder(arguments.run, arguments.device)
    print(report.write(run, place(arguments.to) if arguments.to else None))
