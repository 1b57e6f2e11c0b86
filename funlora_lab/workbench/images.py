"""Images of classes from the same noise across tasks and runs, from changed numbers, and on their way from noise.

Letters: N images of C channels and H x W pixels, K rows. Images are uint8 (N, C, H, W).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import pandas as pd
import torch
from torch import Tensor

from funlora_lab.adapters import Row, stack
from funlora_lab.continual import OpenRun, predict, synthetic, train_classifier
from funlora_lab.data import to_bytes
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver, noise
from funlora_lab.systems import Generator
from funlora_lab.workbench import markup
from funlora_lab.workbench.layers import ALONE
from funlora_lab.workbench.markup import Markup

FRAMES = 17  # states of a film


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

    def compare_tasks(self, classes: Sequence[int]) -> Markup:
        return Markup("".join(self._compared(cls, self.across_tasks(cls)) for cls in classes))

    def compare_runs(self, runs: Sequence[OpenRun], classes: Sequence[int]) -> Markup:
        return Markup("".join(self._compared(cls, self.across_runs(runs, cls)) for cls in classes))

    def _compared(self, cls: int, columns: dict[str, Tensor]) -> str:
        title, drawn = f"class {self.run.known.get(cls) or self.run.classes[cls]}", list(columns.values())
        same, changed = identical(drawn), max(drift(drawn[0], other) for other in drawn)
        words = "bit-identical" if same else f"not identical: up to {changed:.1f} of 255 apart on average"
        rows = [[escape(name), markup.picture(images, f"{title}, {name}")] for name, images in columns.items()]
        return f"<b>{escape(title)}</b> {markup.badge(same, words) if drawn[1:] else ''}{markup.sheet(rows)}"

    def grid(self, images: Tensor, cls: int) -> str:
        """Samples of a class, those outlined that the classifier trained on real images takes for another one."""
        name, taken = self.run.known[cls], self.judged(images)
        wrong = [name in self.run.classes and other != name for other in taken]
        words = [f"sample {i} of class {name}, taken for {other}" for i, other in enumerate(taken, 1)]
        return markup.grid(images, words, wrong)

    def sheet(self, classes: Sequence[int]) -> Markup:
        """One row of images a class, beside what the classifier trained on real images takes them for."""
        rows = []
        for cls in classes:
            drawn, name = self.images(cls), self.run.known[cls]
            recognised = f"{self.judged(drawn).count(name)} of {self.count} recognised"
            judged = recognised if name in self.run.classes else "a class of your own"
            rows.append([f"<b>{escape(name)}</b>", self.grid(drawn, cls), judged])
        return Markup(markup.sheet(rows))

    def film(self, cls: int) -> Markup:
        """A class's images on their way from noise, one frame a moment of the panel's time."""
        states, name = self.path(cls, FRAMES), self.run.known[cls]
        wrong = [name in self.run.classes and taken != name for taken in self.judged(states[-1])]
        words = f"{self.count} images of class {name} from noise to image"
        return Markup(f"<b>{escape(name)}</b>{markup.film(states, words, wrong, 48)}")

    def mixed(self, first: int, second: int, shares: Sequence[float]) -> Markup:
        """(1 - share) of one class's numbers plus ``share`` of another's, for every share."""
        names = self.run.known[first], self.run.known[second]
        one, other = self.run.full_row(first), self.run.full_row(second)
        mixed = [{name: torch.lerp(value, other[name], share) for name, value in one.items()} for share in shares]
        titles = [f"{1 - share:.0%} {names[0]} + {share:.0%} {names[1]}" for share in shares]
        return self._rows(first, dict(zip(titles, mixed, strict=True)))

    def _rows(self, cls: int, rows: dict[str, Row]) -> Markup:
        """Images of every row of numbers, drawn in one batch, with their drift from those of class ``cls`` as it is."""
        rows, x0, lines = {"as learned": self.run.full_row(cls)} | rows, self.noise(cls), []
        K, stacked = len(rows), {name: value.to(x0.device) for name, value in stack(list(rows.values())).items()}
        with ALONE, torch.no_grad():
            velocity = self.run.adapters.velocity(stacked, K)
            drawn = to_bytes(self.solver.integrate(velocity, x0.repeat_interleave(K, 0))[0]).cpu()
        for k, name in enumerate(rows):
            answers = pd.Series(self.judged(drawn[k::K])).value_counts()
            taken = ", ".join(f"{number} × {answer}" for answer, number in answers.items())
            lines.append([name, markup.picture(drawn[k::K], name), f"{drift(drawn[::K], drawn[k::K]):.1f}", taken])
        return Markup(markup.sheet(lines, ("", "same noise", "drift, of 255", "taken for")))


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
