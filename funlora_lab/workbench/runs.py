"""The stored runs as one table, and runs as processes of their own: started, watched, stopped and resumed.

A run in another process never blocks the notebook that started it, and goes on when that notebook is closed; SIGTERM
makes it save and leave, and the same settings resume it.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from funlora_lab.config import Experiment
from funlora_lab.disk import locked, read_lines
from funlora_lab.errors import LabError
from funlora_lab.presets import PRESETS
from funlora_lab.store import Run, home

COLUMNS = (
    "run",
    "preset",
    "method",
    "seed",
    "state",
    "LA",
    "AIA",
    "PPC",
    "recognition",
    "flow_loss",
    "seconds",
    "started",
)
STATES = ("finished", "running", "unfinished", "other version")


def in_use(folder: Path) -> bool:
    """Whether some process is working on the run in ``folder`` at this moment."""
    if not (folder / ".lock").exists():
        return False
    try:
        with locked(folder, patience=0):
            return False
    except LabError:
        return True


def table(where: Path | None = None) -> pd.DataFrame:
    """Every run stored under ``where`` (default: ``home()``): settings, state and results, newest first."""
    lines = []
    for config in sorted((where or home()).glob("*/config.json")):
        try:
            stored = json.loads(config.read_text())
            settings, started = stored["experiment"], stored["provenance"].get("started", "")
            results = json.loads((config.parent / "results.json").read_text()) if _finished(config.parent) else {}
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # no run of this package
        state = "finished" if results else "running" if in_use(config.parent) else "unfinished"
        if settings.keys() != {field.name for field in dataclasses.fields(Experiment)}:
            state = "other version"
        line = {name: settings.get(name) for name in ("preset", "method", "seed")}
        line |= {"run": config.parent.name, "state": state, "started": started[:16].replace("T", " ")}
        lines.append(line | {name: results.get(name) for name in COLUMNS[5:11]})
    frame = pd.DataFrame(lines, columns=list(COLUMNS)).astype({"seed": "Int64", "PPC": "Int64"})
    return frame.sort_values("started", ascending=False, kind="stable").reset_index(drop=True)


def _finished(folder: Path) -> bool:
    return (folder / "results.json").exists()


def chosen(
    frame: pd.DataFrame, text: str = "", state: str = "", by: str = "started", down: bool = True
) -> pd.DataFrame:
    """Runs whose name holds every word of ``text``, of one state (empty: any), sorted by a column."""
    for word in text.split():
        frame = frame[frame["run"].str.contains(word, case=False, regex=False)]
    if state:
        frame = frame[frame["state"] == state]
    return frame.sort_values(by, ascending=not down, kind="stable").reset_index(drop=True)


def accuracies(run: Run) -> list[float]:
    """A_k of Eq. 22 after every task finished so far."""
    return [event["average"] for event in run.events() if event["event"] == "accuracy"]


def losses(run: Run, stage: str) -> pd.DataFrame:
    """(images, loss) of ``base``, ``adapter`` (its classes averaged) or ``classifier`` so far."""
    events = [event for event in run.events() if event["event"] == "loss" and event["stage"] == stage]
    frame = pd.DataFrame(events, columns=["images", "loss"])
    return frame.groupby("images", as_index=False)["loss"].mean()


def progress(run: Run) -> tuple[float, str]:
    """(share of the run that is done, roughly, in [0, 1]; a sentence that says where it stands)."""
    if results := run.results():
        return 1.0, f"Finished: LA {results['LA']:.4f}, AIA {results['AIA']:.4f}."
    events = read_lines(run.log_file)
    tasks = next((len(event["tasks"]) for event in events if event["event"] == "run"), 0)
    if not tasks:
        return 0.0, "Starting."
    done, now = 0, None
    for event in events:
        if event["event"] == "accuracy":
            done, now = done + 1, None
        elif event["event"] == "loss":
            now = event
    if now is None:
        return done / tasks, f"Task {min(done + 1, tasks)} of {tasks}."
    within = now["step"] / now["steps"]
    within = 0.6 + 0.4 * within if now["stage"] == "classifier" and done + 1 < tasks else 0.6 * within
    what = f"adapter of class {now['class']}" if "class" in now else now["stage"]
    sentence = f"Task {done + 1} of {tasks}: {what}, step {now['step']:,} of {now['steps']:,}, loss {now['loss']:.4f}."
    return min(1.0, (done + within) / tasks), sentence


def words(experiment: Experiment) -> list[str]:
    """The arguments of ``funlora run`` that give this experiment: its preset and every setting that differs."""
    base = PRESETS[experiment.preset]
    settings = []
    for field in dataclasses.fields(Experiment):
        value = getattr(experiment, field.name)
        if field.name != "preset" and value != getattr(base, field.name):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            settings += ["--set", f"{field.name}={shown}"]
    return [experiment.preset, *settings]


@dataclasses.dataclass
class Started:
    """A run in a process of its own."""

    run: Run
    process: subprocess.Popen
    said: object  # the file that takes what the process writes

    @property
    def going(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask it to save and leave; it answers within a training step."""
        if self.going:
            self.process.terminate()

    def last_words(self) -> str:
        """Why it ended, in its own words: empty when it finished."""
        if not self.process.poll():
            return ""
        if self.process.returncode == -signal.SIGTERM:
            return "Stopped before its first step; the same settings start it."
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1].removeprefix("funlora: ") if lines else ""
        return said or f"The process ended with status {self.process.returncode}."


def start(experiment: Experiment, where: Path | None = None, device: str = "auto") -> Started:
    """Run (or resume) an experiment in another process, under ``where`` (default: ``home()``)."""
    where = where or home()
    run = Run.of(experiment, where)
    if in_use(run.folder):
        raise LabError(f"The run {run.folder.name} is already running.")
    said = tempfile.TemporaryFile()
    command = [sys.executable, "-m", "funlora_lab", "run", *words(experiment), "--device", device]
    surroundings = os.environ | {"FUNLORA_HOME": str(where)}
    process = subprocess.Popen(
        command,
        env=surroundings,
        stdout=subprocess.DEVNULL,
        stderr=said,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    return Started(run, process, said)


def stop(run: Run) -> None:
    """Ask whichever process of this machine works on a run to save and leave; raises LabError when none does."""
    holder = run.folder / ".holder"
    if not in_use(run.folder) or not holder.exists():
        raise LabError(f"The run {run.folder.name} is not running.")
    _, process, _, machine = holder.read_text().split(maxsplit=3)
    if machine != socket.gethostname():
        raise LabError(f"The run {run.folder.name} is running on {machine}: stop it there.")
    if int(process) == os.getpid():
        raise LabError(f"The run {run.folder.name} is running in this very process.")
    os.kill(int(process), signal.SIGTERM)
