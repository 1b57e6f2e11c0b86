"""What every panel is made of: labelled controls, a place for pictures, and long work in a thread.

Pictures go to ``HTML.value`` and ``Image.value``: an ``Output`` may hang a notebook executed without a browser.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as widgets
import torch

from funlora_lab.continual import OpenRun
from funlora_lab.errors import LabError, Stopped
from funlora_lab.training import Runtime
from funlora_lab.workbench.markup import Markup, problem
from funlora_lab.workbench.runs import described

STOPPED = "Stopped; what was done is saved, and the same button goes on from there."


def control(kind: type, description: str, value, width: str = "260px", height: str | None = None, **settings):
    """A control whose whole description is shown."""
    layout, style = widgets.Layout(width=width, height=height), {"description_width": "initial"}
    return kind(description=description, value=value, **({"layout": layout, "style": style} | settings))


def button(description: str, act: Callable[[], None], icon="", kind="", width="auto", **settings) -> widgets.Button:
    look = {"icon": icon, "button_style": kind, "layout": widgets.Layout(width=width)}
    made = widgets.Button(description=description, **look, **settings)
    made.on_click(lambda _: act())
    return made


def progress_bar() -> widgets.FloatProgress:
    return widgets.FloatProgress(value=0.0, max=1.0, layout=widgets.Layout(width="320px"))


def picture_card() -> widgets.Image:
    """A place for a matplotlib figure: a white card with round corners, on light and dark alike."""
    made = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", align_self="flex-start"))
    return made.add_class("funlora-card")


def row(*controls) -> widgets.Box:
    """Controls side by side, wrapping where the window is narrow."""
    return widgets.Box(controls, layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 14px"))


@contextmanager
def errors_shown_in(place: widgets.HTML) -> Iterator[None]:
    """A user's error becomes a sentence in ``place``."""
    try:
        yield
    except LabError as reason:
        place.value = problem(reason)


class Panel(widgets.VBox):
    """Controls above a picture; a user's error becomes a sentence in the picture's place."""

    def __init__(self, run: OpenRun):
        super().__init__()
        self.run, self.picture, self._silent = run, widgets.HTML(), False

    def __repr__(self) -> str:
        return f"{type(self).__name__}: a live panel; run this cell to use it."

    def on_change(self, act: Callable[[], None], *controls) -> None:
        for one in controls:
            one.observe(lambda _: self._silent or act(), "value")

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Set several controls as one change, without acting on each."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def show(self, make: Callable[[], Markup], place: widgets.HTML | None = None) -> None:
        place = place or self.picture
        with errors_shown_in(place):
            place.value = str(make())


class Job(widgets.VBox):
    """Long work in a thread, one at a time: a bar, a sentence, and a Stop button that ``runtime`` listens to."""

    def __init__(self, device: torch.device):
        self.bar, self.note = progress_bar(), widgets.HTML()
        self.thread, self._asked = threading.Thread(), threading.Event()
        self.stop_button = button("Stop", self._asked.set, "stop", "warning", disabled=True)
        asked = {"stop": lambda: STOPPED if self._asked.is_set() else None, "save_seconds": 5.0}
        self.runtime = Runtime(device, report=lambda event: self.say(*described(event)), **asked)
        super().__init__([row(self.bar, self.stop_button), self.note])

    def begin(self, work: Callable[[], None]) -> None:
        """Start ``work`` in a thread; it calls ``say`` and ``runtime.check`` now and then."""
        if self.thread.is_alive():
            self.note.value = problem("This panel is still at work: wait, or press Stop.")
            return
        self._asked.clear()
        self.bar.bar_style, self.stop_button.disabled = "", False
        self.say(0.0, "Working.")
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
            self.bar.value, self.bar.bar_style, self.note.value = 1.0, "success", "Done."
        except Stopped as reason:
            self.bar.bar_style, self.note.value = "warning", str(reason)
        except Exception as reason:  # whatever it is, a thread has no other way to report it
            unforeseen = f"Something unforeseen went wrong: {type(reason).__name__}: {reason}"
            self.bar.bar_style = "danger"
            self.note.value = problem(reason if isinstance(reason, LabError) else unforeseen)
        finally:
            self.stop_button.disabled = True

    def say(self, share: float, sentence: str) -> None:
        """Show the share that is done, in [0, 1], and a sentence."""
        self.bar.value, self.note.value = share, sentence
