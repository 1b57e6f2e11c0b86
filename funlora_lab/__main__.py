"""The command: ``funlora run | quality | list | notebooks``."""

import argparse
import dataclasses
import json
import signal
import sys
import time

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

    listing = commands.add_parser("list", help="presets, methods, settings and stored runs")
    listing.set_defaults(act=_list)

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
    paths = sorted(run.folder.glob("*.png")) or pictures.save(OpenRun(run, result, runtime))
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


def _quality(arguments) -> None:
    from funlora_lab import continual, fidelity, quality
    from funlora_lab.opened import OpenRun
    from funlora_lab.store import Run
    from funlora_lab.training import Runtime

    for name in ("draws", "images"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise LabError(f"--{name} {getattr(arguments, name)}: accepted is a whole number from 1 up.")
    run = Run.named(arguments.run)
    opened = OpenRun(run, run.results(), Runtime(device=continual.pick_device(arguments.device)))
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
        print(f"{name} ({run.folder.name})\n{quality.wide(table).to_string()}\n")


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


def _notebooks(arguments) -> None:
    from funlora_lab.headless import execute

    for path in execute(arguments.preset, arguments.settings, arguments.only):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
