"""A finished run, opened for reading: what notebooks, pictures, exports and widgets ask of it.

``open_run(experiment)`` trains whatever is missing of a run; ``open_folder(run)`` opens one by its folder or name.
"""

from contextlib import contextmanager
from copy import copy
from functools import cached_property
from itertools import count
from pathlib import Path
from unicodedata import normalize

import pandas as pd
import torch
from torch import Tensor, nn

from funlora_lab.adapters import LABEL, Adapters, Row
from funlora_lab.continual import class_files
from funlora_lab.continual.classifier import train_classifier
from funlora_lab.continual.loop import prepare, run
from funlora_lab.data import remembered
from funlora_lab.errors import LabError
from funlora_lab.experiment import REGISTERED_TEXTS, Experiment
from funlora_lab.store import Run, Store, fingerprint, locked, write_atomically
from funlora_lab.systems import Context, Generator, Source, check_method, draw, generator_of
from funlora_lab.training import Event, Report, Runtime, Watch, pick_device


class OpenRun:
    """The results, log, weights and samples of one finished run, each read when first asked for."""

    def __init__(self, run: Run, runtime: Runtime, read_only: bool = False):
        self.run, self.runtime, self.experiment, self.read_only = run, runtime, run.experiment, read_only
        self._imported: dict[int, str] = {}
        self._refused: dict[int, str] = {}

    results = cached_property(lambda self: self.run.results())

    def summary(self) -> dict:
        """The closing results with their provenance, as kept beside the figures: no paths, no per-class detail."""
        names = "preset method seed LA AIA PPC recognition flow_loss seconds provenance".split()
        return {name: self.results[name] for name in names}

    events = cached_property(lambda self: self.run.events())

    @cached_property
    def context(self) -> Context:
        """What a stored run is read with: of its images it knows the fingerprint, and reads them when looked at.

        LabError unless a method of the user's own is registered, in the words the run was made with.
        """
        file, method = self.run.folder / "method.py", self.experiment.method
        if file.exists() and file.read_text() != REGISTERED_TEXTS.get(method):
            raise LabError(
                f"{self.run.folder.name} was made with a method of its own, {method}, which is not registered as it "
                f"was then: its text is in {file}; register it first (on the command line --with FILE)."
            )
        e, home, made = self.experiment, self.run.folder.parent, self.run.provenance()
        begun = next((event for event in self.events if event["event"] == "run"), None)
        if not begun or "data" not in made:
            return prepare(e, self.runtime, home, self.read_only)[0]
        check_method(method)
        dataset = remembered(e, made["data"], begun["classes"], home, self.runtime.check)
        more = (Store(home), self.runtime, self.read_only)
        return Context(e, dataset, begun["tasks"], *more, base_weights=made.get("base_weights", ""))

    classes = property(lambda self: self.context.dataset.classes)  # names, by index
    tasks = property(lambda self: self.context.tasks)  # the classes of every task, by index
    network = property(lambda self: self.generator.net)

    def generator_after(self, task: int) -> Generator:
        """The generator as it stood after task ``task`` (from 1)."""
        generator = generator_of(self.context)
        for earlier in range(task):
            generator.learn(earlier)
        return generator

    @cached_property
    def generator(self) -> Generator:
        """The generator after the last task, without the classes removed since and with those imported."""
        generator = self.generator_after(len(self.tasks))
        if generator.frozen:
            self._imported, self._refused = class_files.apply(self.run, generator)
        return generator

    @property
    def known(self) -> dict[int, str]:
        """Index and name of every class whose images can be drawn: those of the base, then all others."""
        learned = [*self.generator.labels, *sorted(self.generator.rows)] if self.generator.draws else []
        return {cls: self._imported.get(cls) or self.classes[cls] for cls in learned}

    @property
    def remaining(self) -> list[list[int]]:
        """The classes of every task without those taken out since; a task may be left without any."""
        removed = self.removed
        return [[cls for cls in task if cls not in removed] for task in self.tasks]

    # index and name of every class that was taken out; its ``removed_file``, imported, brings it back
    removed = property(lambda self: class_files.removed(self.run))

    order = property(lambda self: [cls for task in self.remaining for cls in task])  # as they were learned

    def class_of(self, word: str | int) -> int:
        """The index of a class given by name or index; raises LabError when the run does not know it."""
        known, name = self.known, normalize("NFC", str(word))
        names = {str(cls): cls for cls in known} | {normalize("NFC", name): cls for cls, name in known.items()}
        if name in names:
            return word if word in known else names[name]
        for cls, reason in self._refused.items():
            if name == str(cls):
                raise LabError(reason)
        raise LabError(f"class={word}: accepted are the classes of this run, {', '.join(known.values())}.")

    @property
    def adapters(self) -> Adapters:
        """The method over the base network; raises LabError for a method without a frozen base."""
        if not self.generator.frozen:
            raise LabError(f"The method {self.experiment.method} learns no class apart from the others.")
        return self.generator.adapters

    def row(self, cls: int) -> Row:
        """The numbers learned for one class (methods with a frozen base, classes after task 1)."""
        return self.generator.rows[cls]

    def full_row(self, cls: int) -> Row:
        """All of a class's numbers, its label embedding included; a class of task 1 has the neutral row."""
        labels = self.generator.labels
        if cls in labels:
            label = self.network.label_emb.weight.detach()[labels.index(cls)]
            return self.adapters.neutral() | {LABEL: label.cpu().clone()}
        return {LABEL: self.adapters.mean_embedding().cpu()} | self.row(cls)

    def source(self, cls: int) -> Source:
        return self.generator.source(self.class_of(cls))

    def samples(self, cls: int, count: int | None = None) -> Tensor:
        """The first ``count`` samples of a class (default: as many as the run used), uint8 (count, C, H, W)."""
        return draw(self.context, self.source(cls), cls, count or self.experiment.samples_per_class)[0]

    def samples_after(self, task: int, count: int | None = None) -> dict[int, Tensor]:
        """The samples of every class seen by task ``task`` (from 1), as they were drawn then: class -> images."""
        generator, count = self.generator_after(task), count or self.experiment.samples_per_class
        seen = [cls for group in self.tasks[:task] for cls in group]
        return {cls: draw(self.context, generator.source(cls), cls, count)[0] for cls in seen}

    @property
    def class_accuracies(self) -> dict[str, float]:
        """The closing accuracy on the real test images of each class, by name; nan where it was not scored."""
        counts = self.results["confusion"]
        return {name: counts[i][i] / (sum(counts[i]) or float("nan")) for i, name in enumerate(self.classes)}

    @cached_property
    def judge(self) -> nn.Module:
        """The classifier trained on the real images of all classes, in the order they are learned."""
        return train_classifier(self.context, self.context.classes)[0]

    def losses(self, stage: str) -> pd.DataFrame:
        """The logged losses of ``base``, ``adapter`` or ``classifier``: one line an event."""
        rows = [event for event in self.events if event["event"] == "loss" and event["stage"] == stage]
        return pd.DataFrame(rows, columns=["stage", "class", "classes", "step", "steps", "images", "loss", "seconds"])

    @property
    def accuracies(self) -> list[Event]:
        """The events that close the tasks: accuracy, recognition of every class seen, seconds."""
        return [event for event in self.events if event["event"] == "accuracy"]

    averages = property(lambda self: [event["average"] for event in self.accuracies])  # A_k of Eq. 22, where scored

    @property
    def costs(self) -> pd.DataFrame:
        """What each task took: task, new classes, images the generator was trained on, seconds by kind of work.

        The images of an adapter belong to the task of its class, with whichever classes it was trained side by side.
        """
        task_of, now = {cls: k for k, task in enumerate(self.tasks, 1) for cls in task}, 1
        images: dict[tuple, int] = {}  # (task, stage, class) -> images seen
        for event in self.events:
            if event["event"] == "loss" and "classifier" not in event["stage"]:
                cls = event.get("class")
                images[task_of.get(cls, now), event["stage"], cls] = event["images"]
            now += event["event"] == "accuracy"
        seen = pd.Series(images).groupby(level=0).sum() if images else {}
        return pd.DataFrame(
            {"task": e["task"], "new classes": len(e["classes"]), "images": seen.get(e["task"], 0)} | e["seconds"]
            for e in self.accuracies
        )

    @property
    def recognition(self) -> pd.DataFrame:
        """Recognition of every class (lines, as learned) after every task (columns); nan before it is learned."""
        after = {event["task"]: event["recognition"] for event in self.accuracies}
        table = pd.DataFrame(after, index=[str(cls) for cls in self.context.classes], dtype=float)
        return table.set_axis([self.classes[cls] for cls in self.context.classes])

    def tune_class(self, word: str | int, images: Tensor) -> "OpenRun":
        """This run with one class trained on, from its row, on new images uint8 (N, C, H, W) (Sec. 4.2 of the paper).

        The stored run does not change, nor does any other class of the one returned; ``export_class`` of that writes
        the tuned class as a file. A stopped training resumes, a finished one answers from the store.
        """
        cls, e = self._own_row(word), self.experiment
        accepted = (e.channels, e.image_size, e.image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != accepted or not len(images):
            found = f"{images.dtype} {tuple(images.shape)}".removeprefix("torch.")
            raise LabError(f"Images {found}: accepted are one or more of uint8 (N, {', '.join(map(str, accepted))}).")
        tuned = copy(self)
        tuned.generator = self.generator.tuned(cls, images)
        return tuned

    def export_class(self, word: str | int, path: Path) -> Path:
        """Write one class, by name or index, as a file that ``import_class`` of another run over this base takes."""
        cls = self._own_row(word)
        base = fingerprint(self.network.state_dict())
        write_atomically(path, class_files.content(self.adapters, self.row(cls), base, cls, self.known[cls]))
        return path

    def import_class(self, path: Path) -> int:
        """Bring the class of a file into this run; its index. LabError, and nothing changed, where it does not fit."""
        row, facts = class_files.read(path, self.adapters, fingerprint(self.network.state_dict()))
        cls, name = facts["class"], facts["name"]
        if cls < len(self.classes) and name != self.classes[cls]:
            raise LabError(f"{path} holds class {cls} named {name}, which this run's data call {self.classes[cls]}.")
        with self._changing():
            cls = cls if cls < len(self.classes) else self.free_index(name, cls)
            if cls in self.known:
                advice = "`funlora remove` takes it out" if cls in self.generator.rows else "its base was trained on it"
                raise LabError(f"This run already knows class {cls} ({self.known[cls]}); {advice}.")
            content = class_files.content(self.adapters, row, facts["base"], cls, name)
            write_atomically(class_files.file_of(self.run, cls, "safetensors"), content)
        return cls

    def free_index(self, name: str, first: int | None = None) -> int:
        """The index that the class of one's own of that name has or had, else the first free one from ``first`` up.

        What such a class is, its name and its numbers say; its index only tells it from the others of this run.
        """
        data, taken = len(self.classes), class_files.names(self.run)
        mine = [
            cls for cls, other in taken.items() if cls >= data and normalize("NFC", other) == normalize("NFC", name)
        ]
        return mine[0] if mine else next(cls for cls in count(max(data, first or 0)) if cls not in taken)

    def remove_class(self, word: str | int) -> int:
        """Take one class, by name or index, out of this run; its index."""
        cls = self._own_row(word)
        with self._changing():
            self.export_class(cls, self.removed_file(cls))
            class_files.file_of(self.run, cls, "safetensors").unlink(missing_ok=True)
        return cls

    def removed_file(self, cls: int) -> Path:
        """The class file of a class that was taken out."""
        return class_files.file_of(self.run, cls, "removed")

    def _own_row(self, word: str | int) -> int:
        cls = self.adapters and self.class_of(word)
        if cls in self.generator.labels:
            raise LabError(f"class={word}: it was learned with the base itself; only later classes stand alone.")
        return cls

    @contextmanager
    def _changing(self):
        """Hold the run's folder while its classes change, and look at them anew afterwards."""
        with locked(self.run.folder, patience=10):
            (self.run.folder / "classes").mkdir(exist_ok=True)
            self.__dict__.pop("generator", None)  # another process may have changed them meanwhile
            yield
        self.__dict__.pop("generator", None)


def open_run(
    experiment: Experiment, device="auto", report: Report | None = None, home=None, watch: Watch | None = None
) -> OpenRun:
    """The run of this configuration, trained first (or its rest) if it is not finished.

    ``report`` sees every event, ``watch`` what a generator in training draws from the same noise.
    """
    runtime = Runtime(device=pick_device(device), watch=watch)
    run(experiment, report, runtime, home)
    return OpenRun(Run.of(experiment, home), runtime)


def open_folder(word: Path | str, device: str = "auto") -> OpenRun:
    """A finished run by its folder, or by its name under ``home()``; raises LabError when there is none."""
    record = Run.at(word)
    if record.results() is None:
        raise LabError(f"The run {record.folder} is not finished; the same `funlora run` command finishes it.")
    return OpenRun(record, Runtime(device=pick_device(device)))
