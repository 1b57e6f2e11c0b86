"""The command: ``funlora run | list | ledger | export | import | remove | notebooks``."""

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

from funlora_lab import __version__
from funlora_lab.config import METHODS, PRESETS, Experiment, override, preset
from funlora_lab.errors import LabError


def main(words: list[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    try:
        return arguments.act(arguments) or 0
    except LabError as reason:
        print(f"funlora: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("funlora: interrupted; the same command resumes the run.", file=sys.stderr)
        return 130


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
    run.add_argument("--json", action="store_true", help="print the closing result as one JSON object")
    run.set_defaults(act=_run)

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

    notebooks = commands.add_parser("notebooks", help="execute the notebooks for a preset with papermill")
    notebooks.add_argument("preset")
    notebooks.add_argument("--set", action="append", default=[], metavar="PARAMETER=VALUE", dest="settings")
    notebooks.add_argument("--only", metavar="TEXT", help="only notebooks whose name contains TEXT")
    notebooks.set_defaults(act=_notebooks)
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


def _run(arguments) -> None:
    experiment = _experiment(arguments)
    from funlora_lab import continual, pictures
    from funlora_lab.opened import OpenRun
    from funlora_lab.progress import Progress
    from funlora_lab.store import Run
    from funlora_lab.training import Runtime

    runtime = Runtime(device=continual.pick_device(arguments.device), stop=_on_sigterm())
    begun = time.monotonic()
    result = {}
    with Progress(sys.stderr) as progress:
        for event in continual.run(experiment, runtime):
            progress.show(event)
            result = event
    run = Run.of(experiment)
    paths = sorted(run.folder.glob("*.png")) or pictures.save(OpenRun(run, runtime))
    if arguments.json:
        keys = "preset method seed LA AIA PPC recognition flow_loss seconds run".split()
        print(json.dumps({key: result[key] for key in keys}))
    else:
        print(closing_table(result))
        print(f"\nPictures: {', '.join(path.name for path in paths)} in {run.folder}")
        print(f"This call took {time.monotonic() - begun:.1f} s.")


def closing_table(result: dict) -> str:
    """The closing lines of a run, aligned."""

    def share(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.4f}"

    rows = [
        ("method", result["method"]),
        ("LA", f"{share(result['LA'])}   accuracy over all classes after the last task"),
        ("AIA", f"{share(result['AIA'])}   its mean over the tasks"),
        ("PPC", f"{result['PPC']:,}   numbers learned for one class"),
        (
            "recognition",
            f"{share(result['recognition'])}   share of new classes' samples that a real-data judge knows",
        ),
        ("flow loss", f"{share(result['flow_loss'])}   on held-out images of new classes"),
        ("seconds", f"{result['seconds']:.1f}   training, sampling and classifiers, whenever they ran"),
        ("run", result["run"]),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _on_sigterm():
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return lambda: "Asked to stop; everything is saved and the same command resumes the run." if asked else None


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
            print(f"  {config.parent.name}  LA {found['LA']:.4f}  AIA {found['AIA']:.4f}")
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


def _notebooks(arguments) -> None:
    from funlora_lab.headless import execute

    for path in execute(arguments.preset, arguments.settings, arguments.only):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
