"""The command ``funlora``: one block of the parser and one small function a subcommand."""

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import time
from pathlib import Path

from funlora_lab import __version__
from funlora_lab.config import METHODS, PRESETS, Experiment, override, preset
from funlora_lab.errors import LabError, Stopped


def main(words: list[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    arguments.words = sys.argv[1:] if words is None else words
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return arguments.act(arguments) or 0
    except LabError as reason:
        print(f"funlora: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("funlora: interrupted; the same command resumes the run.", file=sys.stderr)
        return 130
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="funlora", description="Generative class-incremental learning with functional LoRA.")
    parser.add_argument("--version", action="version", version=f"funlora-lab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment, or resume it, or show its stored result")
    _experiment_arguments(run)
    run.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    run.add_argument("--compile", default="auto", help="auto (default: on a GPU), off, on or graphs")
    run.add_argument("--json", action="store_true", help="print the closing result as one JSON object")
    run.add_argument("--minutes", type=_minutes, help="stop after so many minutes, saved; the same command goes on")
    share = run.add_mutually_exclusive_group()
    share.add_argument(
        "--classes", metavar="FIRST:LAST", help="learn only these later classes, e.g. 20:40 of the order"
    )
    share.add_argument("--worker", metavar="I/N", help="learn only the I-th of N shares of the later classes")
    run.add_argument("--repair", action="store_true", help="first delete stored files that are damaged, then go on")
    run.set_defaults(act=_run)

    merge = commands.add_parser("merge", help="bring what other homes have finished (shares of a run) into this one")
    merge.add_argument("folders", nargs="+", metavar="FOLDER", help="a FUNLORA_HOME, copied from elsewhere")
    merge.add_argument("--json", action="store_true", help="print what was brought as one JSON object")
    merge.set_defaults(act=_merge)

    quality = commands.add_parser("quality", help="how good the samples of a finished run are")
    quality.add_argument("run", metavar="RUN", help="name of a stored run, or its folder")
    quality.add_argument("--split", default="train", help="real images to compare with: train (default) or test")
    quality.add_argument("--draws", type=int, default=50, help="random halves behind an interval (default 50)")
    quality.add_argument(
        "--inception", metavar="FILE", help="also FID, with these Inception weights (or 'download' to fetch them)"
    )
    quality.add_argument("--images", type=int, help="samples a class for FID (default: as many as the run used)")
    quality.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    quality.add_argument("--json", action="store_true", help="print one JSON object")
    quality.set_defaults(act=_quality)

    verify = commands.add_parser("verify", help="prove from the stored files that a run forgot nothing")
    verify.add_argument("run", help="the folder of a run, by its path or its name")
    verify.add_argument("--device", default="cpu", help="cpu (default), auto, cuda or cuda:N")
    verify.add_argument("--json", action="store_true", help="print the finding as one JSON object")
    verify.set_defaults(act=_verify)

    bench = commands.add_parser("bench", help="how fast a preset's steps are, against torchcfm and naive forms")
    _experiment_arguments(bench)
    bench.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    bench.add_argument("--compile", default="auto", help="auto (default: on a GPU), off, on or graphs")
    bench.add_argument("--batch", type=int, default=0, help="images a step (default: 8 on a CPU, else the preset's)")
    bench.add_argument("--repeats", type=int, default=0, help="counted turns of everything compared (default: 5)")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    bench.set_defaults(act=_bench)

    listing = commands.add_parser("list", help="presets, methods, settings and stored runs")
    listing.set_defaults(act=_list)

    ledger = commands.add_parser("ledger", help="parameters a class: the paper's tables, or a preset's methods")
    ledger.add_argument("preset", nargs="?", help=", ".join(PRESETS) + "; none: the paper's tables beside ours")
    ledger.add_argument("--json", action="store_true", help="print one JSON array of rows")
    ledger.set_defaults(act=_ledger)

    export = commands.add_parser("export", help="write one learned class of a run as a file")
    export.add_argument("run", metavar="RUN", help="a run's folder or its name under FUNLORA_HOME")
    export.add_argument("--class", required=True, metavar="CLASS", dest="cls", help="its name or index")
    export.add_argument("--to", metavar="FILE", help="where to (default: class-INDEX.safetensors here)")
    export.set_defaults(act=_export)

    bring = commands.add_parser("import", help="bring the class of a file into a run over the same base")
    bring.add_argument("run", metavar="RUN", help="a run's folder or its name under FUNLORA_HOME")
    bring.add_argument("file", metavar="FILE")
    bring.set_defaults(act=_import)

    remove = commands.add_parser("remove", help="take one class out of a run; its training stays in the store")
    remove.add_argument("run", metavar="RUN", help="a run's folder or its name under FUNLORA_HOME")
    remove.add_argument("--class", required=True, metavar="CLASS", dest="cls", help="its name or index")
    remove.set_defaults(act=_remove)

    sweep = commands.add_parser(
        "sweep", help="run the tables of a preset over shared bases, or what is missing of them"
    )
    sweep.add_argument("preset", help="taken in its small variant where it has one (digits: digits-small)")
    sweep.add_argument("--tables", default="windows,functions,operations,ratios,methods", help="names joined by commas")
    sweep.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    sweep.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    sweep.add_argument("--plan", action="store_true", help="only show what is done, what remains and how long it takes")
    sweep.set_defaults(act=_sweep)

    notebooks = commands.add_parser("notebooks", help="execute the notebooks for a preset with papermill")
    notebooks.add_argument("preset")
    notebooks.add_argument("--set", action="append", default=[], metavar="PARAMETER=VALUE", dest="settings")
    notebooks.add_argument("--only", metavar="TEXT", help="only notebooks whose name contains TEXT")
    notebooks.set_defaults(act=_notebooks)

    lab = commands.add_parser("lab", help="JupyterLab on the notebooks, for this machine only and with a token")
    lab.add_argument("--port", type=int, default=8888, help="8888, or the next free one")
    lab.add_argument("--no-browser", action="store_true", help="only print the address")
    lab.set_defaults(act=_lab)

    report = commands.add_parser("report", help="a run as one HTML page that needs no network")
    report.add_argument("run", metavar="RUN", help="a run's folder, or its name")
    report.add_argument("--to", metavar="FILE", help="where to write it (default: report.html in the run's folder)")
    report.set_defaults(act=_report)
    return parser


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", help=", ".join(PRESETS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--method", help=", ".join(METHODS))
    parser.add_argument("--seed", help="a whole number from 0 up")


def _experiment(arguments) -> Experiment:
    words = list(arguments.settings)
    words += [f"method={arguments.method}"] if arguments.method is not None else []
    words += [f"seed={arguments.seed}"] if arguments.seed is not None else []
    return override(preset(arguments.preset), words)


def _minutes(word: str) -> float:
    minutes = float(word)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{word}: accepted is a number of minutes above 0")
    return minutes


def _run(arguments) -> None:
    stop = _Stop(arguments.minutes)
    experiment = _experiment(arguments)
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
    from funlora_lab import pictures
    from funlora_lab.opened import OpenRun
    from funlora_lab.store import Run

    run = Run.of(experiment)
    paths = pictures.stored(run.folder) or pictures.save(OpenRun(run, runtime))
    if arguments.json:
        keys = "preset method seed LA AIA PPC recognition flow_loss seconds run".split()
        print(json.dumps({key: result[key] for key in keys} | {"finished": True}))
    else:
        print(closing_table(result))
        print(f"\nPictures: {', '.join(path.name for path in paths)} in {run.folder}")
        print(f"This call took {time.monotonic() - begun:.1f} s.")


def _merge(arguments) -> None:
    from pathlib import Path

    from funlora_lab import shares

    facts = shares.merge([Path(folder).expanduser() for folder in arguments.folders])
    if arguments.json:
        print(json.dumps(facts))
        return
    brought = ", ".join(f"{count} {kind}" for kind, count in facts["brought"].items()) or "nothing new"
    print(f"Brought to {facts['home']}: {brought}; {facts['known']} files were here already.")
    if facts["unfinished"]:
        print(f"{facts['unfinished']} unfinished artefacts were left out: finish their shares and merge again.")


def _verify(arguments) -> int:
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


def _bench(arguments) -> None:
    experiment = _experiment(arguments)
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


def _quality(arguments) -> None:
    from funlora_lab import fidelity, quality
    from funlora_lab.opened import open_folder

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


def _list(arguments) -> None:
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


def _ledger(arguments) -> None:
    from funlora_lab import ledger

    table = ledger.of_preset(arguments.preset) if arguments.preset else ledger.of_paper()
    print(table.to_json(orient="records", indent=1) if arguments.json else ledger.text(table))


def _export(arguments) -> None:
    from funlora_lab.opened import open_folder

    opened = open_folder(arguments.run, "cpu")
    cls = opened.class_of(arguments.cls)
    path = opened.export_class(cls, Path(arguments.to or f"class-{cls}.safetensors"))
    print(f"Class {opened.known[cls]} is in {path}, {path.stat().st_size:,} bytes.")


def _import(arguments) -> None:
    from funlora_lab.opened import open_folder

    opened = open_folder(arguments.run, "cpu")
    cls = opened.import_class(Path(arguments.file))
    print(f"Class {opened.known[cls]} (index {cls}) is now in {opened.run.folder}.")


def _remove(arguments) -> None:
    from funlora_lab.opened import open_folder

    opened = open_folder(arguments.run, "cpu")
    cls = opened.class_of(arguments.cls)
    name = opened.known[cls]
    opened.remove_class(cls)
    print(f"Class {name} (index {cls}) is no longer in {opened.run.folder}; its training stays in the store.")


def _sweep(arguments) -> None:
    from funlora_lab import designs, sweeps, tables

    if arguments.seeds < 1:
        raise LabError(f"seeds={arguments.seeds}: accepted is a whole number from 1 up.")
    base = override(designs.base_of(arguments.preset), arguments.settings)
    wanted = designs.cells(arguments.tables.split(","), base, range(arguments.seeds))
    print(sweeps.status(wanted).to_string(), flush=True)
    if arguments.plan:
        print(f"What remains takes about {sweeps.estimate(wanted, arguments.device):.0f} s.")
        return
    sweeps.perform(wanted, arguments.device, show=print, each=lambda line: print(" ", line, flush=True))
    for name, table in sweeps.summary(sweeps.collect(wanted)).groupby(level=0, sort=False):
        print(f"\n{name}\n{tables.readable(table).to_string()}")


def _notebooks(arguments) -> None:
    from funlora_lab.headless import execute

    for path in execute(arguments.preset, arguments.settings, arguments.only):
        print(path)


def _lab(arguments) -> int:
    from funlora_lab import lab

    return lab.start(arguments.port, not arguments.no_browser)


def _report(arguments) -> None:
    from pathlib import Path

    from funlora_lab import report
    from funlora_lab.opened import open_folder

    print(report.write(open_folder(arguments.run), Path(arguments.to).absolute() if arguments.to else None))


if __name__ == "__main__":
    sys.exit(main())
