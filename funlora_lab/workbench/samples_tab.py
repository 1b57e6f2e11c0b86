"""Panel 2: images from the same noise across tasks, methods and runs, their way from noise, and bent numbers."""

from collections.abc import Callable
from functools import cache

import ipywidgets as widgets

from funlora_lab.config import SOLVERS
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver
from funlora_lab.opened import OpenRun, open_folder
from funlora_lab.workbench import explore, panels, runs
from funlora_lab.workbench.markup import Markup
from funlora_lab.workbench.parts import Job, Panel, button, control, row

VIEWS = ("one row a class", "the same noise after every task", "the same noise in several runs", "from noise to image")
FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


class SamplesPanel(Panel):
    """Draw images of classes; bend a layer's numbers or mix two classes and see what becomes of the same noise."""

    def __init__(self, opened: OpenRun):
        super().__init__()
        self.opened = opened
        names = [(name, cls) for cls, name in opened.known.items()] or [("–", 0)]
        e = opened.experiment
        self.classes = control(widgets.SelectMultiple, "classes", (names[0][1],), "170px", options=names, rows=6)
        self.view = control(widgets.Dropdown, "show", VIEWS[0], "320px", options=VIEWS)
        self.count = control(widgets.IntSlider, "images", 8, min=1, max=16)
        self.solver = control(widgets.Dropdown, "solver", e.solver, "180px", options=SOLVERS)
        self.steps = control(widgets.IntSlider, "steps", e.steps, min=1, max=20)
        self.seed = control(widgets.BoundedIntText, "seed of the noise", e.seed, "200px", min=0, max=10**6)
        self.runs = control(widgets.SelectMultiple, "runs", (), "460px", options=[], rows=4)
        self.film = widgets.Image(format="gif", layout=widgets.Layout(display="none", width="auto"))
        self.job = Job(opened.runtime.device)
        self.draw_button = button("Draw", self.draw, "picture-o", "primary")
        self.refresh_button = button("Look for runs", self.look_for_runs, "refresh")
        self.open = cache(lambda name: open_folder(opened.run.folder.parent / name, str(opened.runtime.device)))
        self.look_for_runs()
        self.children = [
            row(self.classes, widgets.VBox([self.view, self.solver, self.steps, self.count, self.seed])),
            row(self.runs, self.refresh_button),
            row(self.draw_button, self.job),
            self.picture,
            self.film,
            *self._bending(),
        ]

    def _bending(self) -> list:
        """Controls that bend a class's numbers; none for a method without a frozen base and adapted layers."""
        self.bent, self.mixture = widgets.HTML(), widgets.HTML()
        try:
            layers = list(explore.adapted_layers(self.opened))
        except LabError as reason:
            return [widgets.HTML(f"<i>{reason}</i>")]
        new = [(self.opened.known[cls], cls) for cls in explore.new_classes(self.opened)]
        every = [(name, cls) for cls, name in self.opened.known.items()]
        numbers = sorted(explore.layer_numbers(self.opened, new[0][1], layers[0]), key=lambda name: name[-1] in "AB")
        self.bent_class = control(widgets.Dropdown, "class", new[0][1], "140px", options=new)
        self.bent_layer = control(widgets.SelectionSlider, "layer", layers[0], options=layers, continuous_update=False)
        self.number = control(widgets.Dropdown, "what", numbers[0], "180px", options=numbers)
        entries = [("all of them", -1)] + [(f"number {i + 1}", i) for i in range(self.opened.experiment.functions)]
        self.which = control(widgets.Dropdown, "which", -1, "180px", options=entries)
        settings = {"min": -1.0, "max": 3.0, "step": 0.05, "continuous_update": False}
        self.factor = control(widgets.FloatSlider, "times", 1.0, "320px", **settings)
        self.sweep_button = button("Sweep", lambda: self.bend(FACTORS), "bars")
        self.first = control(widgets.Dropdown, "class", new[0][1], "140px", options=every)
        self.second = control(widgets.Dropdown, "and class", new[-1][1], "160px", options=every)
        settings = {"min": 0.0, "max": 1.0, "step": 0.05, "continuous_update": False}
        self.share = control(widgets.FloatSlider, "share of the second", 0.5, "340px", **settings)
        self.mix_sweep_button = button("Sweep", lambda: self.mix(SHARES), "bars")
        bend, mix = (lambda: self.bend((1.0, self.factor.value))), (lambda: self.mix((self.share.value,)))
        self.on_change(bend, self.bent_class, self.bent_layer, self.number, self.which, self.factor)
        self.on_change(mix, self.first, self.second, self.share)
        return [
            widgets.HTML("<b>Bend a layer</b>: multiply what a class learned and watch it drift"),
            row(self.bent_class, self.bent_layer, self.number, self.which, self.factor, self.sweep_button),
            self.bent,
            widgets.HTML("<b>Mix two classes</b>: a weighted mean of their numbers"),
            row(self.first, self.second, self.share, self.mix_sweep_button),
            self.mixture,
        ]

    def look_for_runs(self) -> None:
        """List the finished runs that may be drawn side by side, the opened one chosen."""
        frame = runs.chosen(runs.table(self.opened.run.folder.parent), state="finished")
        kept = [name for name in self.runs.value if name in set(frame["run"])]
        self.runs.options = frame["run"].tolist()
        self.runs.value = kept or [name for name in frame["run"] if name == self.opened.run.folder.name]

    @property
    def chosen_solver(self) -> Solver:
        return Solver(self.solver.value, self.steps.value, self.opened.experiment.tolerance)

    def draw(self) -> None:
        """Draw what is chosen, in a thread, class by class."""
        self.job.begin(self._draw)

    def _draw(self) -> None:
        classes, settings = self.classes.value, (self.count.value, self.chosen_solver, self.seed.value)
        if not classes:
            raise LabError("No class is chosen: choose one or more in the list.")
        self.film.layout.display = "none"
        if self.view.value == VIEWS[3]:
            self._draw_path(classes[0], *settings)
            return
        make: Callable[..., Markup]
        if self.view.value == VIEWS[2]:
            if not self.runs.value:
                raise LabError("No run is chosen: choose one or more in the list.")
            make, what = panels.compare_runs, [self.open(name) for name in self.runs.value]
        else:
            make, what = (panels.sample_sheet if self.view.value == VIEWS[0] else panels.compare_tasks), self.opened
        drawn = ""
        for i, cls in enumerate(classes):
            self.job.runtime.check()
            self.job.tell(i / len(classes), f"Drawing class {self.opened.known[cls]}.")
            drawn += make(what, [cls], *settings).html
            self.picture.value = str(Markup(drawn))

    def _draw_path(self, cls: int, count: int, solver: Solver, seed: int) -> None:
        self.picture.value = str(panels.path_strip(explore.path_of(self.opened, cls, count, solver, seed)))
        self.job.runtime.check()
        self.job.tell(0.5, "Making the animation.")
        self.film.value = panels.animation(explore.path_of(self.opened, cls, count, solver, seed, frames=25))
        self.film.layout.display = ""

    def bend(self, factors: tuple[float, ...]) -> None:
        settings = (self.count.value, self.chosen_solver, self.seed.value)
        which = None if self.which.value < 0 else self.which.value
        what = (self.bent_class.value, self.bent_layer.value, self.number.value, which)
        self.show(lambda: panels.scale_strip(self.opened, *what, factors, *settings), self.bent)

    def mix(self, shares: tuple[float, ...]) -> None:
        settings = (self.count.value, self.chosen_solver, self.seed.value)
        self.show(
            lambda: panels.mix_strip(self.opened, self.first.value, self.second.value, shares, *settings), self.mixture
        )
