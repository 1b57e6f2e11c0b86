"""Breaks a small run in every way a machine can and checks that nothing is lost: the resumed run must leave exactly
the files of an undisturbed one, tensor for tensor and line for line (only seconds and wall-clock dates are ignored).

    python tests/fault_harness.py                       the long one: 100 kills, every write, 20 pairs
    python tests/fault_harness.py --kills 3 --every 60 --pairs 1

* kills   a run saving its progress at every step is killed (SIGKILL) at random moments, up to three times, resumed;
* writes  at the n-th thing a run asks of the disk, for every n, the disk is full, or full in the middle of the write,
          or the process dies in the middle of the write (in turn); the run must end with one sentence, then resume;
* pairs   two processes start at once on the same run, one of them killed in every second pair.

Every run is a forked process of its own. Prints a JSON report; the exit status is 1 when anything differed.
"""

import argparse
import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from funlora_lab import continual, data, preset
from funlora_lab.errors import LabError
from funlora_lab.store import fingerprint, read_lines, read_tensors
from funlora_lab.training import Runtime

EXPERIMENT = preset("smoke").but(
    split="8-2",
    valid_fraction=0.02,
    multipliers=(1,),
    window="4-7",
    dropout=0.1,
    base_images=128,
    adapter_images=64,
    solver="euler",
    steps=1,
    samples_per_class=3,
    chunk=2,
    classifier_epochs=1,
    classifier_batch=400,
    log_every=3,
)
IGNORED = ("seconds", "started", "provenance")
WAYS = ("full", "full in the middle", "killed in the middle")


def strip(value):
    """JSON without times and places."""
    if isinstance(value, dict):
        return {key: strip(item) for key, item in value.items() if key not in IGNORED}
    return [strip(item) for item in value] if isinstance(value, list) else value


def snapshot(home: Path) -> dict[str, str]:
    """Every file below ``home`` by its relative path, as text that is equal when the contents are the same."""
    found = {}
    for path in sorted(path for path in home.rglob("*") if path.is_file() and path.name not in (".lock", ".holder")):
        if path.suffix == ".safetensors":
            tensors, facts = read_tensors(path)
            text = json.dumps([fingerprint(tensors), strip(facts)], sort_keys=True)
        elif path.suffix == ".jsonl":
            assert not path.read_bytes() or path.read_bytes().endswith(b"\n"), f"{path} has a torn last line"
            text = json.dumps(strip(read_lines(path)))
        elif path.suffix == ".json":
            text = json.dumps(strip(json.loads(path.read_text())))
        else:
            text = path.read_bytes().hex()
        found[str(path.relative_to(home))] = text
    return found


def start(home: Path, prepare=lambda: None) -> int:
    """Run the experiment in a forked process -> its id. It exits with 0 (done), 2 (one sentence) or 3 (a traceback)."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        prepare()
        continual.run(EXPERIMENT, runtime=Runtime(save_seconds=0), home=home)
        code = 0
    except LabError:
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(child: int) -> int:
    """Wait for a process -> its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Faults:
    """Counts everything the process asks of the disk below ``home`` and lets the ``at``-th request fail."""

    def __init__(self, home: Path, at: int = -1, way: str = "full"):
        self.home, self.at, self.way, self.count = str(home), at, way, 0

    def install(self) -> None:
        real_open = builtins.open

        def open_(file, mode="r", *words, **more):
            if not self.ours(file) or mode in ("r", "rb"):
                return real_open(file, mode, *words, **more)
            self.pass_or_fail()
            opened = real_open(file, mode, *words, **more)
            return Writer(opened, lambda content: self.write(opened, content))

        builtins.open = io.open = open_
        for name in ("replace", "truncate", "unlink", "mkdir", "fsync", "open"):
            setattr(os, name, self.wrapped(getattr(os, name), always=name == "fsync"))

    def ours(self, path) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self.home)

    def wrapped(self, function, always: bool):
        def call(path, *words, **more):
            changes = function.__name__ != "open" or (words and words[0] & os.O_CREAT)
            if (always or self.ours(path)) and changes:
                self.pass_or_fail()
            return function(path, *words, **more)

        return call

    def due(self) -> bool:
        self.count += 1
        return self.count - 1 == self.at

    def pass_or_fail(self) -> None:
        if self.due():
            if self.way == "killed in the middle":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, file, content):
        if not self.due():
            return file.write(content)
        if self.way != "full":
            file.write(content[: len(content) // 2])
            file.flush()
        if self.way == "killed in the middle":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Writer:
    """An open file whose ``write`` is another function."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class Harness:
    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)
        self.folder = Path(tempfile.mkdtemp(prefix="funlora-faults-"))
        self.report = {"kills": 0, "resumes": 0, "faults": {way: 0 for way in WAYS}, "pairs": 0}
        self.report |= {"differences": 0, "lost": 0, "tracebacks": 0, "killed after": Counter(), "problems": []}
        begun = time.monotonic()
        self.expected = self.undisturbed("first")
        self.seconds = time.monotonic() - begun
        self.compare("the same again", self.undisturbed("second"))
        faults = Faults(self.folder / "counted")
        read, write = os.pipe()

        def prepare() -> None:
            faults.install()
            real_exit = os._exit
            os._exit = lambda code: (os.write(write, str(faults.count).encode()), real_exit(code))

        end(start(self.folder / "counted", prepare))
        self.requests = self.report["requests to the disk"] = int(os.read(read, 20))

    def undisturbed(self, name: str) -> dict[str, str]:
        assert end(start(self.folder / name)) == 0
        return snapshot(self.folder / name)

    def compare(self, what: str, got: dict[str, str]) -> None:
        lost = sorted(self.expected.keys() - got.keys())
        wrong = sorted(k for k in got if got[k] != self.expected.get(k))
        self.report["lost"] += len(lost)
        self.report["differences"] += len(wrong)
        for name in wrong:
            if name.endswith(".jsonl"):
                mine, other = (json.loads(text.get(name, "[]")) for text in (self.expected, got))
                pairs = [pair for pair in zip(mine, other, strict=False) if pair[0] != pair[1]]
                what += f" [{name}: {len(mine)} lines, now {len(other)}; {str(pairs[:1])[:300]}]"
        if lost or wrong:
            self.report["problems"].append(f"{what}: lost {lost[:5]}, different {wrong[:5]}")

    def check_status(self, what: str, status: int, accepted: tuple[int, ...]) -> None:
        if status not in accepted:
            self.report["tracebacks"] += status == 3
            self.report["problems"].append(f"{what}: ended with {status}")

    def finish(self, what: str, home: Path) -> None:
        """Resume until done, compare, and forget the folder."""
        self.report["resumes"] += 1
        self.check_status(what, end(start(home)), (0,))
        try:
            self.compare(what, snapshot(home))
        except (LabError, AssertionError, ValueError) as reason:
            self.report["differences"] += 1
            self.report["problems"].append(f"{what}: {reason}")
        shutil.rmtree(home)

    def kill(self, number: int) -> None:
        home = self.folder / f"kill-{number}"
        for _ in range(self.random.choice([1, 1, 2, 3])):
            child = start(home)
            time.sleep(self.random.random() * self.seconds)
            os.kill(child, signal.SIGKILL)
            if end(child) == -signal.SIGKILL:
                self.report["kills"] += 1
                self.report["killed after"][self.whereabouts(home)] += 1
            else:
                break
        self.finish(f"kill {number}", home)

    def whereabouts(self, home: Path) -> str:
        """The kind of the last event the run had logged when it was killed."""
        logs = list(home.glob("*/metrics.jsonl"))
        events = read_lines(logs[0]) if logs else []
        return " ".join(str(events[-1].get(k, "")) for k in ("event", "stage")).strip() if events else "nothing"

    def fail(self, at: int, way: str) -> None:
        home = self.folder / f"write-{at}"
        status = end(start(home, Faults(home, at, way).install))
        # a full disk may also hit what is not needed (the note who holds a lock): then the run just goes on
        self.check_status(f"request {at}, {way}", status, (-signal.SIGKILL,) if "killed" in way else (0, 2))
        self.report["faults"][way] += 1
        self.finish(f"request {at}, {way}", home)

    def pair(self, number: int) -> None:
        home = self.folder / f"pair-{number}"
        children = [start(home), start(home)]
        if number % 2:
            time.sleep(self.random.random() * self.seconds)
            os.kill(children[0], signal.SIGKILL)
            end(children.pop(0))
        for child in children:
            self.check_status(f"pair {number}", end(child), (0,))
        self.report["pairs"] += 1
        self.finish(f"pair {number}", home)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--every", type=int, default=1, help="fail only every N-th request to the disk")
    parser.add_argument("--at", type=int, help="fail only this request, in all three ways")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data.load(EXPERIMENT)  # so that the forked processes need not import what reads it
    harness = Harness(arguments.seed)
    try:
        number = 0
        while harness.report["kills"] < arguments.kills:
            harness.kill(number)
            number += 1
        if arguments.at is not None:
            for way in WAYS:
                harness.fail(arguments.at, way)
        else:
            for at in range(arguments.seed % arguments.every, harness.requests, arguments.every):
                harness.fail(at, WAYS[at // arguments.every % len(WAYS)])
        for number in range(arguments.pairs):
            harness.pair(number)
    finally:  # an interrupted harness still says what it saw
        shutil.rmtree(harness.folder)
        print(json.dumps(harness.report, indent=1))
    return bool(harness.report["problems"])


if __name__ == "__main__":
    sys.exit(main())
