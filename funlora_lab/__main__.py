"""The command ``funlora``: its parser, and how it ends when something is wrong."""

import argparse
import signal
import sys

from funlora_lab import __version__, commands
from funlora_lab.config import METHODS
from funlora_lab.errors import LabError
from funlora_lab.presets import PRESETS


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
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = subcommands.add_parser("run", help="run an experiment, or resume it, or show its stored result")
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
    run.set_defaults(act=commands.run)

    merge = subcommands.add_parser("merge", help="bring what other homes have finished (shares of a run) into this one")
    merge.add_argument("folders", nargs="+", metavar="FOLDER", help="a FUNLORA_HOME, copied from elsewhere")
    merge.add_argument("--json", action="store_true", help="print what was brought as one JSON object")
    merge.set_defaults(act=commands.merge)

    quality = subcommands.add_parser("quality", help="how good the samples of a finished run are")
    quality.add_argument("run", metavar="RUN", help="name of a stored run, or its folder")
    quality.add_argument("--split", default="train", help="real images to compare with: train (default) or test")
    quality.add_argument("--draws", type=int, default=50, help="random halves behind an interval (default 50)")
    quality.add_argument(
        "--inception", metavar="FILE", help="also FID, with these Inception weights (or 'download' to fetch them)"
    )
    quality.add_argument("--images", type=int, help="samples a class for FID (default: as many as the run used)")
    quality.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    quality.add_argument("--json", action="store_true", help="print one JSON object")
    quality.set_defaults(act=commands.quality)

    verify = subcommands.add_parser("verify", help="prove from the stored files that a run forgot nothing")
    verify.add_argument("run", help="the folder of a run, by its path or its name")
    verify.add_argument("--device", default="cpu", help="cpu (default), auto, cuda or cuda:N")
    verify.add_argument("--json", action="store_true", help="print the finding as one JSON object")
    verify.set_defaults(act=commands.verify)

    bench = subcommands.add_parser("bench", help="how fast a preset's steps are, against torchcfm and naive forms")
    _experiment_arguments(bench)
    bench.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    bench.add_argument("--compile", default="auto", help="auto (default: on a GPU), off, on or graphs")
    bench.add_argument("--batch", type=int, default=0, help="images a step (default: 8 on a CPU, else the preset's)")
    bench.add_argument("--repeats", type=int, default=0, help="counted turns of everything compared (default: 5)")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    bench.set_defaults(act=commands.bench)

    listing = subcommands.add_parser("list", help="presets, methods, settings and stored runs")
    listing.set_defaults(act=commands.listing)

    ledger = subcommands.add_parser("ledger", help="parameters a class: the paper's tables, or a preset's methods")
    ledger.add_argument("preset", nargs="?", help=", ".join(PRESETS) + "; none: the paper's tables beside ours")
    ledger.add_argument("--json", action="store_true", help="print one JSON array of rows")
    ledger.set_defaults(act=commands.ledger)

    export = subcommands.add_parser("export", help="write one learned class of a run as a file")
    export.add_argument("run", metavar="RUN", help="a run's folder or its name under FUNLORA_HOME")
    export.add_argument("--class", required=True, metavar="CLASS", dest="cls", help="its name or index")
    export.add_argument("--to", metavar="FILE", help="where to (default: class-INDEX.safetensors here)")
    export.set_defaults(act=commands.export)

    bring = subcommands.add_parser("import", help="bring the class of a file into a run over the same base")
    bring.add_argument("run", metavar="RUN", help="a run's folder or its name under FUNLORA_HOME")
    bring.add_argument("file", metavar="FILE")
    bring.set_defaults(act=commands.bring)

    remove = subcommands.add_parser("remove", help="take one class out of a run; its training stays in the store")
    remove.add_argument("run", metavar="RUN", help="a run's folder or its name under FUNLORA_HOME")
    remove.add_argument("--class", required=True, metavar="CLASS", dest="cls", help="its name or index")
    remove.set_defaults(act=commands.remove)

    sweep = subcommands.add_parser(
        "sweep", help="run the tables of a preset over shared bases, or what is missing of them"
    )
    sweep.add_argument("preset", help="taken in its small variant where it has one (digits: digits-small)")
    sweep.add_argument("--tables", default="windows,functions,operations,ratios,methods", help="names joined by commas")
    sweep.add_argument("--row", action="append", default=[], dest="rows", help="only this row of them (repeatable)")
    sweep.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    sweep.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    sweep.add_argument("--plan", action="store_true", help="only show what is done, what remains and how long it takes")
    sweep.set_defaults(act=commands.sweep)

    notebooks = subcommands.add_parser("notebooks", help="execute the notebooks for a preset with papermill")
    notebooks.add_argument("preset")
    notebooks.add_argument("--set", action="append", default=[], metavar="PARAMETER=VALUE", dest="settings")
    notebooks.add_argument("--only", metavar="TEXT", help="only notebooks whose name contains TEXT")
    notebooks.set_defaults(act=commands.notebooks)

    lab = subcommands.add_parser("lab", help="JupyterLab on the notebooks, for this machine only and with a token")
    lab.add_argument("--port", type=int, default=8888, help="8888, or the next free one")
    lab.add_argument("--no-browser", action="store_true", help="only print the address")
    lab.set_defaults(act=commands.lab)

    report = subcommands.add_parser("report", help="a run as one HTML page that needs no network")
    report.add_argument("run", metavar="RUN", help="a run's folder, or its name")
    report.add_argument("--to", metavar="FILE", help="where to write it (default: report.html in the run's folder)")
    report.set_defaults(act=commands.report)
    return parser


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", help=", ".join(PRESETS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--method", help=", ".join(METHODS))
    parser.add_argument("--seed", help="a whole number from 0 up")


def _minutes(word: str) -> float:
    minutes = float(word)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{word}: accepted is a number of minutes above 0")
    return minutes


if __name__ == "__main__":
    sys.exit(main())
