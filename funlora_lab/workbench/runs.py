"""The stored runs as one table, and runs as processes of their own: started, watched, stopped and resumed.

A run goes on when the notebook that started it is closed; SIGTERM makes it save and leave, the same settings resume it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment, shown
from funlora_lab.presets import preset
from funlora_lab.store import Run, in_use, listing
from funlora_lab.training import Event

NUMBERS = ["seed", "LA", "AIA", "PPC", "recognition", "flow_loss", "seconds"]
COLUMNS = ["run", "preset", "method", "seed", "state", *NUMBERS[1:], "started"]


def table(where: Path | None = None, text="", state="", by="started", descending=True) -> pd.DataFrame:
    """The runs under ``where`` (default: ``home()``) in one state, whose names hold every word of ``text``, sorted."""
    lines = []
    for run in listing(where):
        if state in ("", run["state"]) and all(word.casefold() in run["name"].casefold() for word in text.split()):
            about = {"run": run["name"], "state": run["state"], "started": run["started"][:16].replace("T", " ")}
            lines.append((run["settings"] or {}) | (run["results"] or {}) | about)
    frame = pd.DataFrame(lines, columns=COLUMNS)
    frame[NUMBERS] = frame[NUMBERS].apply(pd.to_numeric, errors="coerce")
    frame = frame.astype({"seed": "Int64", "PPC": "Int64"})
    return frame.sort_values(by, ascending=not descending, kind="stable").reset_index(drop=True)


def measured(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def scores(results: dict) -> str:
    return f"LA {measured(results['LA'])}, AIA {measured(results['AIA'])}"


def described(event: Event) -> tuple[float, str]:
    """(share of the present training or drawing that is done, a sentence) of one event of a run."""
    match event["event"]:
        case "loss":
            what = f"adapter of class {event['class']}" if "class" in event else f"the {event['stage']}"
            sentence = f"Training {what}, step {event['step']:,} of {event['steps']:,}, loss {event['loss']:.4f}."
            return event["step"] / event["steps"], sentence
        case "samples":
            return event["drawn"] / event["of"], f"Drawing class {event['class']}: {event['drawn']} of {event['of']}."
        case "accuracy":
            return event["task"] / event["of"], f"Task {event['task']} of {event['of']}: {event['average']:.4f}."
    return 0.0, "Working."


def progress(run: Run) -> tuple[float, str]:
    """(share of the run that is done, roughly, in [0, 1]; a sentence that says where it stands)."""
    if results := run.results():
        return 1.0, f"Finished: {scores(results)}."
    events = run.events()
    if not events:
        return 0.0, "Starting."
    tasks, done = len(events[0]["tasks"]), sum(event["event"] == "accuracy" for event in events)
    last = next((event for event in reversed(events) if event["event"] in ("accuracy", "loss")), {})
    share, sentence = described(last) if last.get("event") == "loss" else (0.0, "")
    judged = last.get("stage") == "classifier" and done + 1 < tasks
    share = min(1.0, (done + (0.6 + 0.4 * share if judged else 0.6 * share)) / tasks)
    return share, f"Task {min(done + 1, tasks)} of {tasks}. {sentence}".strip()


def arguments(experiment: Experiment) -> list[str]:
    """What follows ``funlora`` on the command line that gives this experiment: its preset and all that differs."""
    settings = experiment.unlike(preset(experiment.preset)).items()
    return ["run", experiment.preset, *(w for name, value in settings for w in ("--set", f"{name}={shown(value)}"))]


class Started(subprocess.Popen):
    """A run in a process of its own, begun or resumed under ``where``; terminate() stops it."""

    def __init__(self, experiment: Experiment, where: Path, device: str):
        self.run, self.complaints = Run.of(experiment, where), tempfile.TemporaryFile()
        if in_use(self.run.folder):
            raise LabError(f"The run {self.run.folder.name} is already running.")
        words = [sys.executable, "-m", "funlora_lab", *arguments(experiment), "--device", device]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": self.complaints}
        super().__init__(words, env=os.environ | {"FUNLORA_HOME": str(where)}, start_new_session=True, **streams)

    @property
    def going(self) -> bool:
        return self.poll() is None

    def reason(self) -> str:
        """Why it ended, as it wrote itself; empty when it finished or is going."""
        if not self.poll():
            return ""
        if self.returncode == -signal.SIGTERM:
            return "Stopped before its first step; the same settings start it."
        self.complaints.seek(0)
        *_, last = "", *filter(str.strip, self.complaints.read().decode(errors="replace").splitlines())
        return last.strip().removeprefix("funlora: ") or f"The process ended with status {self.returncode}."


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
