"""Images of classes from the same noise across tasks and runs, from changed numbers, on their way, and in training.

Letters: N images of C channels and H x W pixels, K rows. Images are uint8 (N, C, H, W).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from operator import itemgetter

import pandas as pd
import torch
from torch import Tensor

from funlora_lab.adapters import stack
from funlora_lab.continual import OpenRun, predict, synthetic, train_classifier
from funlora_lab.data import to_bytes
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver, noise
from funlora_lab.systems import Generator
from funlora_lab.training import Event
from funlora_lab.workbench import markup
from funlora_lab.workbench.layers import ALONE
from funlora_lab.workbench.markup import Markup
from funlora_lab.workbench.runs import Progress

FRAMES = 17  # states of a film
EVERY = 0.25  # seconds, at least, between two moments of a training that are shown


def identical(images: Sequence[Tensor]) -> bool:
    return all(torch.equal(images[0], other) for other in images)


def drift(before: Tensor, after: Tensor) -> float:
    """Mean absolute difference of images, in grey levels from 0 to 255."""
    return (before.float() - after.float()).abs().mean().item()


@dataclass(frozen=True)
class SameNoise:
    """A run's images, ``count`` of a class, from noise that is the same for every task, method and run."""

    run: OpenRun
    count: int
    solver: Solver
    seed: int = 0

    def noise(self, cls: int) -> Tensor:
        """Where class ``cls`` starts (count, C, H, W), on the run's device."""
        e = self.run.experiment
        shape = (self.count, e.channels, e.image_size, e.image_size)
        return noise(self.seed, cls, 0, shape).to(self.run.runtime.device)

    def path(self, cls: int, frames: int = 0, generator: Generator | None = None) -> Tensor:
        """uint8 states (frames, N, C, H, W) of a class from noise to image, by ``generator`` or the run's own."""
        if not self.run.generator.draws:
            raise LabError(f"The run {self.run.run.folder.name} draws no images: its method trains no generator.")
        source = generator.source(cls) if generator else self.run.source(cls)
        with ALONE, torch.no_grad():
            solver = source.solver or self.solver
            return to_bytes(solver.path(source.velocity(), self.noise(cls), frames)[0]).cpu()

    def images(self, cls: int) -> Tensor:
        return self.path(cls, 2)[-1]

    def across_tasks(self, cls: int) -> dict[str, Tensor]:
        """A class's images after every task that knows it; each task's generator is loaded afresh."""
        after = [k for k in range(1, len(self.run.tasks) + 1) if any(cls in classes for classes in self.run.tasks[:k])]
        if not after:
            raise LabError(f"Class {self.run.known[cls]} was imported: it belongs to no task of this run.")
        return {f"after task {k}": self.path(cls, 2, self.run.generator_after(k))[-1] for k in after}

    def across_runs(self, runs: Sequence[OpenRun], cls: int) -> dict[str, Tensor]:
        """A class's images in several runs; raises LabError when their classes or sizes differ from this run's."""
        for run in runs:
            if run.classes != self.run.classes or run.experiment.image_size != self.run.experiment.image_size:
                raise LabError(f"The run {run.run.folder.name} has other classes or another image size than this one.")
        return {run.run.folder.name: replace(self, run=run).images(cls) for run in runs}

    def judged(self, images: Tensor) -> list[str]:
        """What the run's classifier trained on the real images of all classes takes images for: class names."""
        answers = predict(self.run.judge, images, self.run.runtime.device).tolist()
        return [self.run.classes[self.run.context.classes[i]] for i in answers]

    def verdict(self, images: Tensor, cls: int) -> tuple[list[str], list[bool], str]:
        """What images of a class are taken for, which are taken for another class, and how many are recognised.

        A class of one's own is none that the classifier knows.
        """
        name, taken = self.run.known[cls], self.judged(images)
        if name not in self.run.classes:
            return taken, [False] * len(taken), "a class of your own"
        return taken, [one != name for one in taken], f"{taken.count(name)} of {len(taken)} recognised"

    def compare_tasks(self, classes: Sequence[int]) -> Markup:
        return Markup("".join(self.compared(cls, self.across_tasks(cls)) for cls in classes))

    def compared(self, cls: int, columns: dict[str, Tensor]) -> str:
        """A class's images of several origins, a row each, and whether they are the same."""
        title, drawn = f"class {self.run.known.get(cls) or self.run.classes[cls]}", list(columns.values())
        same, changed = identical(drawn), max(drift(drawn[0], other) for other in drawn)
        words = "bit-identical" if same else f"not identical: up to {changed:.1f} of 255 apart on average"
        rows = [[escape(name), markup.picture(images, f"{title}, {name}")] for name, images in columns.items()]
        return f"<b>{escape(title)}</b> {markup.badge(same, words) if drawn[1:] else ''}{markup.sheet(rows)}"

    def grid(self, images: Tensor, cls: int) -> tuple[str, str]:
        """Samples of a class, outlined where they are taken for another, and how many are recognised."""
        taken, wrong, words = self.verdict(images, cls)
        names = [f"sample {i} of class {self.run.known[cls]}, taken for {one}" for i, one in enumerate(taken, 1)]
        return markup.grid(images, names, wrong), words

    def sheet(self, cls: int) -> str:
        """A row of images of a class, beside what the classifier of real images takes them for."""
        return markup.sheet([[f"<b>{escape(self.run.known[cls])}</b>", *self.grid(self.images(cls), cls)]])

    def film(self, cls: int) -> str:
        """A class's images on their way from noise, one frame a moment of the panel's time."""
        states, name = self.path(cls, FRAMES), self.run.known[cls]
        words = f"{self.count} images of class {name} from noise to image"
        return f"<b>{escape(name)}</b>{markup.film(states, words, self.verdict(states[-1], cls)[1], 48)}"

    def mixed(self, first: int, second: int, shares: Sequence[float]) -> str:
        """(1 - share) of one class's numbers plus ``share`` of another's, for every share, drawn in one batch."""
        names, x0, lines = [self.run.known[cls] for cls in (first, second)], self.noise(first), []
        one, other = self.run.full_row(first), self.run.full_row(second)
        mixed = [{name: torch.lerp(one[name], other[name], share) for name in one} for share in (0.0, *shares)]
        K, stacked = len(mixed), {name: value.to(x0.device) for name, value in stack(mixed).items()}
        with ALONE, torch.no_grad():
            velocity = self.run.adapters.velocity(stacked, K)
            drawn = to_bytes(self.solver.integrate(velocity, x0.repeat_interleave(K, 0))[0]).cpu()
        titles = ["as learned", *(f"{1 - share:.0%} {names[0]} + {share:.0%} {names[1]}" for share in shares)]
        for k, title in enumerate(titles):
            answers = pd.Series(self.judged(drawn[k::K])).value_counts()
            taken = ", ".join(f"{number} × {answer}" for answer, number in answers.items())
            lines.append([title, markup.picture(drawn[k::K], title), f"{drift(drawn[::K], drawn[k::K]):.1f}", taken])
        return markup.sheet(lines, ("", "same noise", "drift, of 255", "taken for"))


class Watching:
    """Shows a training of which a runtime's ``report`` and ``watch`` tell: ``show`` is given a bar and what is seen."""

    def __init__(self, show: Callable[[str, str], None]):
        self.show, self.progress, self.bar, self.shown = show, Progress(), "", 0.0
        self.looks, self.losses = [], {}  # (event, row of a table) of one training; (stage, class) -> [(step, loss)]

    def report(self, event: Event) -> None:
        """Take note of an event; one that is read back from disk is shown with the next that is not."""
        share, sentence = self.progress.see(event)
        if event["event"] == "loss":
            line = self.losses.setdefault((event["stage"], event.get("class")), [])
            line[:] = [point for point in line if point[0] < event["step"]] + [(event["step"], event["loss"])]
        if not event.get("replayed"):
            self.bar = markup.bar(share, escape(sentence)) if event["event"] != "result" else ""
            self._show(at_once=not self.bar)

    def watch(self, event: Event, images: Tensor) -> None:
        """Add a look at a training to those before, of this training alone."""
        training, step = itemgetter("stage", "classes", "steps"), event["step"]
        before = [one for one in self.looks if training(one[0]) == training(event) and one[0]["step"] < step]
        self.looks = [*before, (event, [f"step {step:,}", markup.picture(images, f"samples at step {step}")])]
        self._show(at_once=True)

    def _show(self, at_once: bool) -> None:
        if at_once or time.monotonic() - self.shown > EVERY:
            self.show(self.bar, self.seen() if self.looks else "")
            self.shown = time.monotonic()

    def seen(self) -> str:
        """A row of images a look, beside the curve of the loss, a line a class."""
        event, _ = self.looks[-1]
        lines = [self.losses.get((event["stage"], cls), []) for cls in event["classes"] or [None]]
        lines = list(filter(None, lines)) or [[(look["step"], look["loss"]) for look, _ in self.looks]]
        what = " of class ".join(filter(None, [event["stage"], ", ".join(map(str, event["classes"]))]))
        curves = markup.curves(lines, event["steps"], f"loss of the {what}")
        title = f"<b>{escape(what)}, in training: samples from the same noise, and the loss</b>"
        return f'{title}<div class="row">{markup.sheet([row for _, row in self.looks])}{curves}</div>'


def tested(run: OpenRun) -> tuple[Tensor, Tensor]:
    """(answers, true classes) of the run's last classifier on the real test images, in their order; or LabError."""
    if run.results["LA"] is None:
        raise LabError(f"The run {run.run.folder.name} trained no classifier after its last task.")
    context, order = run.context, run.context.classes
    if not run.generator.draws:
        return train_classifier(context, order, context.dataset.train.of(order), {"real": order})[1:]
    generator, samples = run.generator_after(len(run.tasks)), run.samples_after(len(run.tasks))
    sources = {cls: generator.source(cls) for cls in order}
    return train_classifier(context, order, *synthetic(context, sources, samples))[1:]
