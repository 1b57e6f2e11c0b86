"""A run opened for reading: what notebooks, pictures, exports and widgets ask of it.

``open_run(experiment)`` finds the run by its configuration and trains whatever is missing, so notebooks may be opened
in any order. ``open_folder(run)`` opens a finished run by its folder or name.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from funlora_lab import classfiles, continual, data
from funlora_lab.adapters import Adapters, Row
from funlora_lab.config import Experiment
from funlora_lab.disk import locked, make_folder, write_atomically
from funlora_lab.errors import LabError
from funlora_lab.frozen import FrozenBase
from funlora_lab.generators import generator_of
from funlora_lab.network import WholeNetwork
from funlora_lab.sampling import draw
from funlora_lab.store import Run, Store
from funlora_lab.training import Event, Runtime
from funlora_lab.unet import UNet
from funlora_lab.work import Source, Work


def exhaust(events) -> object:
    """Run a generator of events to its end without looking at them; returns what it returns."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


class OpenRun:
    """The results, log, weights and samples of one finished run, each read when first asked for."""

    def __init__(self, run: Run, runtime: Runtime):
        self.run, self.runtime = run, runtime
        self._imported: dict[int, str] = {}

    @cached_property
    def results(self) -> dict:
        return self.run.results()

    @property
    def experiment(self) -> Experiment:
        return self.run.experiment

    def summary(self) -> dict:
        """The closing results with their provenance, as kept beside the figures: no paths, no per-class detail."""
        names = "preset method seed LA AIA PPC recognition flow_loss seconds provenance".split()
        return {name: self.results[name] for name in names}

    @cached_property
    def events(self) -> list[Event]:
        return self.run.events()

    @cached_property
    def work(self) -> Work:
        dataset = data.load(self.experiment, self.run.folder.parent)
        tasks = data.tasks(self.experiment, len(dataset.classes))
        return Work(self.experiment, dataset, tasks, Store(self.run.folder.parent), self.runtime)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.work.dataset.classes

    @property
    def tasks(self) -> list[list[int]]:
        return self.work.tasks

    def learner_after(self, task: int) -> WholeNetwork | None:
        """The generator as it stood after task ``task`` (from 1); None for classifier-multitask."""
        learner = generator_of(self.work)
        for earlier in range(task):
            if learner is not None:
                exhaust(learner.learn(earlier))
        return learner

    @cached_property
    def learner(self) -> WholeNetwork | None:
        """The generator after the last task, without the classes removed since and with those imported."""
        learner = self.learner_after(len(self.tasks))
        if isinstance(learner, FrozenBase):
            self._imported = classfiles.apply(self.run, learner)
        return learner

    @property
    def known(self) -> dict[int, str]:
        """Index and name of every class whose images can be drawn: those of the base, then all others."""
        if self.learner is None:
            return {}
        learned = [*self.learner.labels, *sorted(getattr(self.learner, "rows", ()))]
        return {cls: self._imported.get(cls) or self.classes[cls] for cls in learned}

    def class_of(self, word: str | int) -> int:
        """The index of a class given by name or index; raises LabError when the run does not know it."""
        names = {name: cls for cls, name in self.known.items()}
        if word in names or word in self.known:
            return names.get(word, word)
        if str(word).isdecimal() and int(word) in self.known:
            return int(word)
        raise LabError(f"class={word}: accepted are the classes of this run, {', '.join(names)}.")

    @property
    def network(self) -> UNet:
        return self.learner.net

    @property
    def adapters(self) -> Adapters:
        """The method over the base network (methods with a frozen base only)."""
        return self.learner.adapters

    def row(self, cls: int) -> Row:
        """The numbers learned for one class (methods with a frozen base, classes after task 1)."""
        assert isinstance(self.learner, FrozenBase)
        return self.learner.rows[cls]

    def source(self, cls: int) -> Source:
        return self.learner.source(self.class_of(cls))

    def samples(self, cls: int, count: int | None = None) -> Tensor:
        """The first ``count`` samples of a class (default: as many as the run used), uint8 (count, C, H, W)."""
        return self._draw(self.source(cls), cls, count)

    def samples_after(self, task: int, count: int | None = None) -> dict[int, Tensor]:
        """The samples of every class seen by task ``task`` (from 1), as they were drawn then: class -> images."""
        learner = self.learner_after(task)
        return {cls: self._draw(learner.source(cls), cls, count) for classes in self.tasks[:task] for cls in classes}

    def _draw(self, source: Source, cls: int, count: int | None) -> Tensor:
        count = self.experiment.samples_per_class if count is None else count
        stage = continual.sample_stage(self.work, source, cls)
        images, _ = exhaust(draw(stage, source.velocity, self.experiment, cls, count, self.runtime))
        return images

    @cached_property
    def judge(self) -> nn.Module:
        """The classifier trained on the real images of all classes, in the order they are learned."""
        everything = [cls for task in self.tasks for cls in task]
        images, origin = self.work.dataset.train.of(everything), {"real": everything}
        net, _, _ = exhaust(continual.train_classifier(self.work, everything, images, origin))
        return net

    def losses(self, stage: str) -> pd.DataFrame:
        """The logged losses of ``base``, ``adapter`` or ``classifier``: one line an event."""
        rows = [event for event in self.events if event["event"] == "loss" and event["stage"] == stage]
        return pd.DataFrame(rows, columns=["stage", "class", "classes", "step", "steps", "images", "loss", "seconds"])

    @property
    def accuracies(self) -> list[Event]:
        """The events that close the tasks: accuracy, recognition of every class seen, seconds."""
        return [event for event in self.events if event["event"] == "accuracy"]

    @property
    def costs(self) -> pd.DataFrame:
        """What each task took: task, new classes, images the generator was trained on, seconds by kind of work."""
        rows, images = [], {}
        for event in self.events:
            if event["event"] == "loss" and event["stage"] != "classifier":
                images[event["stage"], event.get("class")] = event["images"]
            if event["event"] == "accuracy":
                kept = {"task": event["task"], "new classes": len(event["classes"]), "images": sum(images.values())}
                rows.append(kept | event["seconds"])
                images = {}
        return pd.DataFrame(rows)

    @property
    def recognition(self) -> pd.DataFrame:
        """Recognition of every class (lines, as learned) after every task (columns); nan before it is learned."""
        after = {event["task"]: event["recognition"] for event in self.accuracies}
        everything = [cls for task in self.tasks for cls in task]
        table = {task: [shares.get(str(cls), float("nan")) for cls in everything] for task, shares in after.items()}
        return pd.DataFrame(table, index=[self.classes[cls] for cls in everything])

    @property
    def averages(self) -> list[float]:
        """A_k of Eq. 22 after every task."""
        return [event["average"] for event in self.accuracies]

    def export_class(self, word: str | int, path: Path) -> Path:
        """Write one class, by name or index, as a file that ``import_class`` of another run over this base takes."""
        cls = self._own_row(word)
        base, name = classfiles.base_fingerprint(self.network), self.known[cls]
        write_atomically(path, classfiles.content(self.adapters, self.row(cls), base, cls, name))
        return path

    def import_class(self, path: Path) -> int:
        """Bring the class of a file into this run; returns its index.

        Raises LabError, and changes nothing, when the file is damaged, was learned over another base or by another
        method, or when the run already knows a class of that index.
        """
        self._frozen()
        row, facts = classfiles.read(path, self.adapters, classfiles.base_fingerprint(self.network))
        cls, name = facts["class"], facts["name"]
        if cls in self.known:
            raise LabError(f"This run already knows class {cls} ({self.known[cls]}); `funlora remove` takes it out.")
        if cls < len(self.classes) and name != self.classes[cls]:
            raise LabError(f"{path} holds class {cls} named {name}, which this run's data call {self.classes[cls]}.")
        target = classfiles.imported_file(self.run, cls)
        with self._changing():
            write_atomically(target, classfiles.content(self.adapters, row, facts["base"], cls, name))
        return cls

    def remove_class(self, word: str | int) -> int:
        """Take one class, by name or index, out of this run; its training stays in the store. Returns its index."""
        cls = self._own_row(word)
        with self._changing():
            if cls in self._imported:
                classfiles.imported_file(self.run, cls).unlink()
            else:
                write_atomically(classfiles.removal_mark(self.run, cls), b"")
        return cls

    def _frozen(self) -> None:
        if not isinstance(self.learner, FrozenBase):
            raise LabError(f"The method {self.experiment.method} learns no class apart from the others.")

    def _own_row(self, word: str | int) -> int:
        self._frozen()
        cls = self.class_of(word)
        if cls in self.learner.labels:
            raise LabError(f"class={word}: it was learned with the base itself; only later classes stand alone.")
        return cls

    @contextmanager
    def _changing(self):
        """Hold the run's folder while its classes change, and look at them anew afterwards."""
        make_folder(self.run.folder / "classes")
        with locked(self.run.folder, patience=10):
            yield
        del self.__dict__["learner"]


def open_run(
    experiment: Experiment,
    device: str = "auto",
    show: Callable[[Event], None] = lambda event: None,
    home: Path | None = None,
) -> OpenRun:
    """The run of this configuration, trained first (or its rest) if it is not finished; ``show`` sees every event."""
    runtime = Runtime(device=continual.pick_device(device))
    for event in continual.run(experiment, runtime, home):
        show(event)
    return OpenRun(Run.of(experiment, home), runtime)


def open_folder(word: Path | str, device: str = "auto") -> OpenRun:
    """A finished run by its folder, or by its name under ``home()``; raises LabError when there is none."""
    run = Run.at(word)
    if run.results() is None:
        raise LabError(f"The run {run.folder} is not finished; the same `funlora run` command finishes it.")
    return OpenRun(run, Runtime(device=continual.pick_device(device)))
