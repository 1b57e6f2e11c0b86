"""Images from the same noise: a row a class, across tasks and runs, on their way from noise, mixed; the confusion."""

from html import escape

import pandas as pd
from traitlets import Int, List, Unicode

from funlora_lab.errors import LabError
from funlora_lab.flow import SOLVERS, Solver
from funlora_lab.workbench import markup
from funlora_lab.workbench.controls import button, field, film_controls, picks, place, row, select, slider
from funlora_lab.workbench.images import FRAMES, SameNoise, tested
from funlora_lab.workbench.panel import Drawer, Panel, held

CLASSES, TASKS, RUNS, PATH, MIXED = VIEWS = (
    "one row a class",
    "the same noise after every task",
    "the same noise in the runs that are chosen",
    "from noise to image",
    "the first two classes mixed",
)
SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


class SamplesPanel(Panel):
    """What is chosen draws itself; while it does, the panel says that the pictures are still the old ones."""

    title = "which draws classes from the same noise"
    picked, view, count = held(List), held(Unicode, VIEWS[0]), held(Int, 8)
    solver, steps, seed = held(Unicode), held(Int), held(Int)
    how, pictures = held(Unicode), held(Unicode)

    def __init__(self, bench):
        self.drawer = Drawer(self.draw)
        super().__init__(bench)
        self.on_change(self._form, "view", "solver")
        self.on_change(self.redraw, "picked", "view", "count", "solver", "steps", "seed")

    def renew(self) -> None:
        e, classes = self.run.experiment, self.classes
        with self.quietly():
            if not self.solver:
                self.solver, self.steps, self.seed = e.solver, e.steps, e.seed
            known = [cls for _, cls in classes]
            self.picked = [cls for cls in self.picked if cls in known] or known[:10]
            chosen = row(select("view", "show", [(v, v) for v in VIEWS]), picks("picked", "classes", classes))
            self.body = chosen + place("how") + place("note") + place("pictures")
            self._form()
        self.redraw()

    def _form(self) -> None:
        """Only the controls that mean something to what is shown."""
        own = self.run.generator.draws and self.run.source(self.classes[0][1]).solver  # that of a diffusion
        parts = [] if own else [select("solver", "solver", [(name, name) for name in SOLVERS])]
        parts += [] if own or Solver(self.solver).adaptive else [slider("steps", "steps", 1, max(20, self.steps))]
        parts += [slider("count", "images", 1, 16), field("seed", "seed of the noise", "number", 90)]
        self.how = row(*parts, *([film_controls(FRAMES)] if self.view == PATH else []))

    @property
    def noise(self) -> SameNoise:
        solver = Solver(self.solver, self.steps, self.run.experiment.tolerance)
        return SameNoise(self.run, self.count, solver, self.seed)

    def redraw(self) -> None:
        if not self.pictures:  # the first time, which a page waits for
            self.draw()
            return
        self.note = "These are still the pictures before; drawing."
        self.drawer.wake()

    def draw(self) -> None:
        view, noise, drawn = self.view, self.noise, []
        try:
            if not self.run.generator.draws:
                raise LabError(f"The run {self.run.run.folder.name} draws no images: its method trains no generator.")
            if not self.picked:
                raise LabError("No class is chosen: choose one or more.")
            if view == MIXED:
                if len(self.picked) < 2:
                    raise LabError("One class is chosen: choose two to mix.")
                drawn.append(noise.mixed(*self.picked[:2], SHARES))
            runs = self.bench.opened() if view == RUNS else []
            draws = {CLASSES: noise.sheet, PATH: noise.film}
            draws[TASKS] = lambda cls: noise.compared(cls, noise.across_tasks(cls))
            draws[RUNS] = lambda cls: noise.compared(cls, noise.across_runs(runs, cls))
            for cls in self.picked if view != MIXED else ():
                if self.drawer.moved.is_set():
                    return
                drawn.append(draws[view](cls))
            self.pictures, self.note = "".join(drawn), ""
        except LabError as reason:
            self.pictures, self.note = markup.problem(reason), ""


class ConfusionPanel(Panel):
    """Which real test images the last classifier confuses; a cell opens its images."""

    title = "which shows the test images that are confused"
    cell, table, opened = held(List), held(Unicode), held(Unicode)
    MOST = 20  # classes that are shown as a matrix

    def __init__(self, bench):
        super().__init__(bench)
        self.on_change(self._open, "cell")

    def renew(self) -> None:
        self.body = row(place("table"), place("opened")) + place("note")
        try:
            self.answers, self.true = tested(self.run)
        except LabError as reason:
            self.body = markup.problem(reason)
            return
        counts, order = self.run.results["confusion"], self.run.context.classes
        wrong = sorted(((counts[i][j], i, j) for i in order for j in order if i != j and counts[i][j]), reverse=True)
        self.wrong = wrong or [(counts[order[0]][order[0]], order[0], order[0])]
        with self.quietly():
            if not self.cell or max(self.cell) >= len(self.run.classes):
                self.cell = list(self.wrong[0][1:])
        self._open()

    def press_open(self, pair: str) -> None:
        """Open a cell, named by the true class and the answer."""
        self.cell = [int(cls) for cls in pair.split()]

    def _button(self, count: int, true: int, answer: int, label: str) -> str:
        about = f"{count} images of class {self.run.classes[true]} taken for {self.run.classes[answer]}"
        kind = "wrong" * (true != answer)
        return button("open", label, kind, f"{true} {answer}", about, self.cell == [true, answer])

    def _draw(self) -> None:
        names, counts, order = self.run.classes, self.run.results["confusion"], self.run.context.classes
        if len(order) > self.MOST:
            pairs = (self._button(n, i, j, f"{names[i]} → {names[j]}: {n}") for n, i, j in self.wrong[:40])
            self.table = f'<div class="scrolls" style="max-height:260px">{"<br>".join(pairs)}</div>'
            return
        cells = [[self._button(n, i, j, str(n)) if (n := counts[i][j]) else "·" for j in order] for i in order]
        titles = [escape(names[cls]) for cls in order]
        table = pd.DataFrame(cells, titles, titles).to_html(border=0, escape=False)
        self.table = f"True class (rows), answer (columns){table}"

    def _open(self) -> None:
        true, answer = self.cell
        names, test = self.run.classes, self.run.context.dataset.test.of(self.run.context.classes)
        found = test.pixels[(self.true == true) & (self.answers == answer)]
        title = f"{len(found)} test images of class {names[true]}, taken for {names[answer]}"
        words = [f"test image {i} of class {names[true]}, taken for {names[answer]}" for i in range(1, len(found) + 1)]
        parts = [f"<b>{escape(title)}</b>{markup.grid(found[:24], words[:24], [true != answer] * len(words[:24]))}"]
        noise = SameNoise(self.run, 16, Solver(self.run.experiment.solver, self.run.experiment.steps))
        for cls in dict.fromkeys(cls for cls in self.cell if cls in self.run.known):
            drawn = self.run.samples(cls, 16)
            parts.append(f"<b>Samples of class {escape(names[cls])}</b>{noise.grid(drawn, cls)[0]}")
        self.opened = "".join(parts)
        self._draw()
