"""Panel 2: images from the same noise across tasks, methods and runs, their way from noise, and changed numbers."""

from functools import cache, partial

import ipywidgets as widgets

from funlora_lab.continual import OpenRun, open_folder
from funlora_lab.errors import LabError
from funlora_lab.flow import SOLVERS, Solver
from funlora_lab.workbench import images, markup, runs
from funlora_lab.workbench.layers import AdaptedLayers
from funlora_lab.workbench.panel import Job, Panel, button, control, row

VIEWS = ("one row a class", "the same noise after every task", "the same noise in several runs", "from noise to image")
FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


class SamplesPanel(Panel):
    def __init__(self, run: OpenRun):
        super().__init__(run)
        e, self.home, self.job = run.experiment, run.run.folder.parent, Job(run.runtime.device)
        self.every = [(name, cls) for cls, name in run.known.items()] or [("–", 0)]
        _, first = self.every[0]
        self.classes = control(widgets.SelectMultiple, "classes", (first,), "170px", options=self.every, rows=6)
        self.view = control(widgets.Dropdown, "show", VIEWS[0], "320px", options=VIEWS)
        self.count = control(widgets.IntSlider, "images", 8, min=1, max=16)
        self.solver = control(widgets.Dropdown, "solver", e.solver, "180px", options=list(SOLVERS))
        self.steps = control(widgets.IntSlider, "steps", e.steps, min=1, max=max(20, e.steps))
        self.seed = control(widgets.BoundedIntText, "seed of the noise", e.seed, "200px", max=10**6)
        self.runs = control(widgets.SelectMultiple, "runs", (), "460px", options=[], rows=4)
        self.film = widgets.Image(format="gif", layout=widgets.Layout(display="none", width="auto"))
        self.draw_button = button("Draw", lambda: self.job.begin(self._draw), "picture-o", "primary")
        self.refresh_button = button("Look for runs", self.look_for_runs, "refresh")
        self.open = cache(lambda name: open_folder(self.home / name, str(run.runtime.device)))
        self.look_for_runs()
        how = row(self.classes, widgets.VBox([self.view, self.solver, self.steps, self.count, self.seed]))
        runs, drawing = row(self.runs, self.refresh_button), row(self.draw_button, self.job)
        self.children = [how, runs, drawing, self.picture, self.film, *self._changing()]

    def _changing(self) -> list[widgets.Widget]:
        """Controls that change a class's numbers; a sentence for a run without adapted layers or classes of its own."""
        self.scaled, self.mixed, new = widgets.HTML(), widgets.HTML(), list(self.run.generator.rows)
        try:
            adapted = AdaptedLayers(self.run)
        except LabError as reason:
            return [widgets.HTML(f"<i>{reason}</i>")]
        numbers = sorted(adapted.numbers(new[0], min(adapted.names)), key=lambda name: name[-1] in "AB")
        layers, own = list(adapted.names), [(name, cls) for name, cls in self.every if cls in new]
        which = [("all of them", -1)] + [(f"number {i + 1}", i) for i in range(self.run.experiment.functions)]
        slow = {"continuous_update": False, "step": 0.05}
        self.of_class = control(widgets.Dropdown, "class", new[0], "140px", options=own)
        self.layer = control(widgets.SelectionSlider, "layer", layers[0], options=layers, continuous_update=False)
        self.number = control(widgets.Dropdown, "what", numbers[0], "180px", options=numbers)
        self.which = control(widgets.Dropdown, "which", -1, "180px", options=which)
        self.factor = control(widgets.FloatSlider, "times", 1.0, "320px", min=-1.0, max=3.0, **slow)
        self.scale_sweep_button = button("Sweep", lambda: self.scale(*FACTORS), "bars")
        self.first = control(widgets.Dropdown, "class", new[0], "140px", options=self.every)
        self.second = control(widgets.Dropdown, "and class", new[-1], "160px", options=self.every)
        self.share = control(widgets.FloatSlider, "share of the second", 0.5, "340px", max=1.0, **slow)
        self.mix_sweep_button = button("Sweep", lambda: self.mix(*SHARES), "bars")
        scaling, mixing = (self.of_class, self.layer, self.number, self.which), (self.first, self.second)
        self.on_change(lambda: self.scale(self.factor.value), *scaling, self.factor)
        self.on_change(lambda: self.mix(self.share.value), *mixing, self.share)
        bend = widgets.HTML("<b>Bend a layer</b>: multiply what a class learned and watch it drift")
        mix = widgets.HTML("<b>Mix two classes</b>: a weighted mean of their numbers")
        scaling = row(*scaling, self.factor, self.scale_sweep_button)
        return [bend, scaling, self.scaled, mix, row(*mixing, self.share, self.mix_sweep_button), self.mixed]

    def look_for_runs(self) -> None:
        """List the finished runs that may be drawn side by side, the opened one chosen."""
        names = runs.table(self.home, state="finished")["run"].tolist()
        kept = [name for name in self.runs.value if name in names]
        self.runs.options = names
        self.runs.value = kept or [name for name in names if name == self.run.run.folder.name]

    @property
    def drawer(self) -> images.SameNoise:
        solver = Solver(self.solver.value, self.steps.value, self.run.experiment.tolerance)
        return images.SameNoise(self.run, self.count.value, solver, self.seed.value)

    def _draw(self) -> None:
        classes, drawer, view, drawn = self.classes.value, self.drawer, self.view.value, ""
        if not classes:
            raise LabError("No class is chosen: choose one or more in the list.")
        if view == VIEWS[2] and not self.runs.value:
            raise LabError("No run is chosen: choose one or more in the list.")
        self.film.layout.display = "none"
        if view == VIEWS[3]:
            self.picture.value = str(images.path_sheet(drawer.path(classes[0])))
            self.job.runtime.check()
            self.job.say(0.5, "Making the animation.")
            self.film.value, self.film.layout.display = images.animation(drawer.path(classes[0], 25)), ""
            return
        chosen = [self.open(name) for name in self.runs.value] if view == VIEWS[2] else []
        draw = (drawer.sheet, drawer.compare_tasks, partial(drawer.compare_runs, chosen))[VIEWS.index(view)]
        for i, cls in enumerate(classes):
            self.job.runtime.check()
            self.job.say(i / len(classes), f"Drawing class {self.run.known.get(cls)}.")
            drawn += draw([cls]).html
            self.picture.value = str(markup.Markup(drawn))

    def scale(self, *factors: float) -> None:
        *what, which = (one.value for one in (self.of_class, self.layer, self.number, self.which))
        self.show(lambda: self.drawer.scaled(*what, None if which < 0 else which, factors), self.scaled)

    def mix(self, *shares: float) -> None:
        self.show(lambda: self.drawer.mixed(self.first.value, self.second.value, shares), self.mixed)
