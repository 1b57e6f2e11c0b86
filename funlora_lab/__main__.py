"""The command ``funlora``: its parser, and how it ends when something is wrong."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable

from funlora_lab import __version__, commands
from funlora_lab.errors import LabError, Stopped, memory_for
from funlora_lab.presets import PRESETS

SHARED = {  # arguments of several subcommands
    "preset": {"help": ", ".join(PRESETS)},
    "run": {"metavar": "RUN", "help": "a run's folder, or its name under FUNLORA_HOME"},
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "dest": "settings", "help": "repeatable"},
    "--method": {"help": "a method or system of `funlora list`"},
    "--seed": {"help": "a whole number from 0 up"},
    "--device": {"default": "auto", "help": "auto, cpu, cuda or cuda:N (default: %(default)s)"},
    "--class": {"required": True, "metavar": "CLASS", "dest": "cls", "help": "its name or index"},
    "--ray": {"nargs": "?", "const": "local", "metavar": "HOST:PORT", "help": "on a Ray cluster; alone: a local Ray"},
    "--base-workers": {"metavar": "N", "help": "with --ray: N workers of Ray Train, a GPU each, train a base"},
    "--json": {"action": "store_true", "help": "print the result as JSON"},
    "--with": {"action": "append", "default": [], "metavar": "FILE.py", "dest": "files", "help": "execute it first"},
}


def main(words: list[str] | None = None) -> int:
    """Do what the words of a command line say -> its exit status: 1: something changed, 2: refused, 130: stopped."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot spell is escaped
    arguments = _parser().parse_args(words)
    arguments.words = sys.argv[1:] if words is None else words
    for option in ("ray", "base_workers"):
        if word := getattr(arguments, option, None):
            os.environ[f"FUNLORA_{option.upper()}"] = word
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with memory_for("image_size, base_channels or the number of images at once"):
            if getattr(arguments, "base_workers", None) and not os.environ.get("FUNLORA_RAY"):
                raise LabError("--base-workers: accepted with --ray; without it, torchrun starts several processes.")
            commands.execute(*getattr(arguments, "files", []))
            status = arguments.act(arguments) or 0
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # who read the output wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LabError as reason:
        print(f"funlora: {reason}", file=sys.stderr)
        return 130 if isinstance(reason, Stopped) else 2
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
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, act, shared: str, help: str) -> argparse.ArgumentParser:
        command = subcommands.add_parser(name, help=help, description=help)
        for argument in shared.split():
            command.add_argument(argument, **SHARED[argument])
        command.set_defaults(act=act)
        return command

    minutes, count = _above_zero(float), _above_zero(int)
    settings, ray = "preset --set --method --seed --device --json --with", "--ray --base-workers"
    run = add("run", commands.run, f"{settings} {ray}", "run an experiment, or resume it, or show its stored result")
    run.add_argument("--minutes", type=minutes, help="stop after so many minutes, saved; the same command goes on")
    run.add_argument(
        "--watch", action="store_true", help="keep what is drawn in training in the run's folder training/"
    )
    run.add_argument("--repair", action="store_true", help="first delete stored files that are damaged, then go on")
    quality = add("quality", commands.quality, "run --device --json --with", "how good a finished run's samples are")
    quality.add_argument("--split", default="train", help="real images to compare with: train (default) or test")
    quality.add_argument("--draws", type=count, default=50, help="random halves behind an interval (default 50)")
    quality.add_argument("--inception", metavar="FILE", help="also FID, with these weights, or 'download'")
    quality.add_argument("--images", type=count, help="samples a class for FID (default: as many as the run used)")
    about = "prove from the stored files that a run forgot nothing; exit status 1 when something changed"
    add("verify", commands.verify, "run --device --json --with", about).set_defaults(device="cpu")
    bench = add("bench", commands.bench, settings, "how fast a preset's steps are, against torchcfm and naive forms")
    bench.add_argument("--batch", type=count, default=0, help="images a step (default: the preset's, or a second's)")
    bench.add_argument("--repeats", type=count, default=0, help="counted turns of everything compared (default: 5)")
    add("list", commands.listing, "--with", "presets, methods, solvers, data sources, settings and stored runs")
    ledger = add("ledger", commands.ledger, "--json --with", "parameters a class, the paper's and a preset's")
    ledger.add_argument("preset", nargs="?", help=", ".join(PRESETS) + "; none: the paper's tables beside ours")
    export = add("export", commands.export, "run --class --with", "write one learned class of a run as a file")
    export.add_argument("--to", metavar="FILE", help="where to (default: class-INDEX.safetensors here)")
    bring = add("import", commands.bring, "run --with", "bring the class of a file into a run over the same base")
    bring.add_argument("file", metavar="FILE")
    add("remove", commands.remove, "run --class --with", "take a class out of a run; its training stays in the store")
    sweep = add("sweep", commands.sweep, f"preset --set --device --with {ray}", "run what a preset's tables lack")
    every = "windows,functions,functions_everywhere,operations,ratios,methods,systems"
    sweep.add_argument("--tables", default=every, help="joined by commas")
    sweep.add_argument("--row", action="append", default=[], dest="rows", help="only this row of them (repeatable)")
    sweep.add_argument("--seeds", type=count, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    sweep.add_argument("--plan", action="store_true", help="only show what is done, what remains and how long it takes")
    sweep.add_argument("--gpus", type=count, metavar="N", help="with --plan: on 1, 8 and N GPUs at the paper's pace")
    notebooks = add("notebooks", commands.notebooks, f"preset --set {ray}", "execute the notebooks for a preset")
    notebooks.add_argument("--only", metavar="TEXT", help="only notebooks whose name contains TEXT")
    lab = add("lab", commands.lab, "", "JupyterLab on the notebooks, for this machine only and with a token")
    lab.add_argument("--port", type=int, default=8888, help="8888, or the next free one")
    lab.add_argument("--no-browser", action="store_true", help="only print the address")
    report = add("report", commands.report, "run --device --with", "a run as one HTML page that needs no network")
    report.add_argument("--to", metavar="FILE", help="where to write it (default: report.html in the run's folder)")
    return parser


def _above_zero(kind: type) -> Callable[[str], float]:
    def read(word: str) -> float:
        if not 0 < kind(word) < float("inf"):
            raise argparse.ArgumentTypeError(f"{word}: accepted is a number above 0")
        return kind(word)

    read.__name__ = kind.__name__  # by which argparse refuses other words
    return read


if __name__ == "__main__":
    sys.exit(main())
