"""The stored runs as one table, and runs as processes of their own: started, watched, stopped and resumed.

A run goes on when the notebook that started it is closed; SIGTERM makes it save and leave, the same settings resume it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment, shown
from funlora_lab.presets import preset
from funlora_lab.store import Run, in_use, listing
from funlora_lab.training import Event
from funlora_lab.workbench.progress import measured

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


def differences(names: Sequence[str], where: Path | None = None) -> pd.DataFrame:
    """The settings in which runs differ, one line a setting and one column a run, as words."""
    known = {run["name"]: run["settings"] or {} for run in listing(where)}
    frame = pd.DataFrame({name: {key: shown(v) for key, v in known.get(name, {}).items()} for name in names})
    frame = frame.astype(object).fillna("")
    return frame[frame.nunique(axis=1, dropna=False) > 1].drop(index=["preset"], errors="ignore")


def short_names(unlike: pd.DataFrame) -> dict[str, str]:
    """The runs of ``differences`` by settings that suffice to tell them apart: methods by name, others as key=value."""
    words = dict.fromkeys(unlike, "")
    for key in sorted(unlike.index, key=lambda key: key != "method"):
        more = {n: f"{words[n]} {'' if key == 'method' else f'{key}='}{unlike.loc[key, n]}".strip() for n in words}
        words = more if len({*more.values()}) > len({*words.values()}) else words
    return words if len({*words.values()} - {""}) == len(words) else {name: name for name in words}


def scores(results: dict) -> str:
    return f"LA {measured(results['LA'])}, AIA {measured(results['AIA'])}"


def described(event: Event) -> str:
    """A sentence on one event of a run."""
    match event["event"]:
        case "loss":
            what = f"adapter of class {event['class']}" if "class" in event else f"the {event['stage']}"
            return f"Training {what}, step {event['step']:,} of {event['steps']:,}, loss {event['loss']:.4f}."
        case "cluster":
            return "A Ray cluster is at work on it."
        case "samples":
            return f"Drawing class {event['class']}: {event['drawn']} of {event['of']}."
        case "accuracy":
            return f"Task {event['task']} of {event['of']}: {event['average']:.4f}."
    return "Working."


class Progress:
    """How far a run is, from its events: a share of [0, 1] that never falls, and a sentence with the time that remains.

    Of a task, training counts for 0.6, drawing for 0.1 and the classifier for 0.3; events read back take no time.
    """

    def __init__(self):
        self.tasks, self.done, self.share, self.trained, self.begun = 1, 0, 0.0, False, None

    def see(self, event: Event) -> tuple[float, str]:
        kind, within = event["event"], 0.0
        if kind == "run":
            self.tasks = len(event["tasks"])
        elif kind == "accuracy":
            self.done, self.trained = event["task"], False
        elif kind == "loss" and event["stage"] != "classifier":
            self.trained, within = True, 0.6 * event["step"] / event["steps"]
        elif kind == "cluster":  # the log begins with the driver
            within, self.begun = event["share"], (time.monotonic() - event["seconds"], 0.0)
        elif kind == "samples":
            within = 0.6 + 0.1 * event["drawn"] / event["of"]
        elif kind == "loss" and self.trained:  # the classifier of real images comes before all training
            within = 0.7 + 0.3 * event["step"] / event["steps"]
        self.share = max(self.share, min(1.0, (self.done + within) / self.tasks))
        now, remains = time.monotonic(), ""
        if self.begun is None and not event.get("replayed"):
            self.begun = now, self.share
        if self.begun and self.share - self.begun[1] > 0.02:
            seconds = (now - self.begun[0]) * (1 - self.share) / (self.share - self.begun[1])
            remains = f" About {seconds / 60:.0f} min remain." if seconds > 90 else f" About {seconds:.0f} s remain."
        task = f"Task {min(self.done + 1, self.tasks)} of {self.tasks}. " if self.tasks > 1 else ""
        return self.share, f"{task}{described(event)}{remains}"


def progress(run: Run, known: Progress | None = None) -> tuple[float, str]:
    """(share of the run that is done, a sentence on where it stands); ``known`` has seen its log before."""
    if results := run.results():
        return 1.0, f"Finished: {scores(results)}."
    seen, shown = known or Progress(), ("run", "loss", "accuracy", "cluster")
    return [(0.0, "Starting."), *(seen.see(event) for event in run.events() if event["event"] in shown)][-1]


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
        words = [sys.executable, "-m", "funlora_lab", *arguments(experiment), "--device", device, "--watch"]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": self.complaints}
        about = {"FUNLORA_HOME": str(where), "OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait leave the page its cores
        super().__init__(words, env=os.environ | about, start_new_session=True, **streams)

    @property
    def going(self) -> bool:
        return self.poll() is None

    @property
    def looks(self) -> list[Path]:
        """What the training at work has drawn so far, from the same noise, by step."""
        found = sorted((self.run.folder / "training").glob("*.png"), key=lambda path: path.stat().st_mtime)
        return [path for path in found if path.stem.rpartition("-")[0] == found[-1].stem.rpartition("-")[0]]

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
