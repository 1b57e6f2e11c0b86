"""What every panel of the workbench is made of: labelled controls, a place for pictures, and long work in a thread.

Nothing here uses ipywidgets' ``Output`` or ``interact``: pictures go to ``HTML.value`` and ``Image.value``, so that a
notebook executed without a browser never waits for one.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as widgets
import torch

from funlora_lab.errors import LabError, Stopped
from funlora_lab.training import Event, Runtime
from funlora_lab.workbench.markup import Markup, problem

WIDE = {"description_width": "initial"}
STOPPED = "Stopped; what was done is saved, and the same button goes on from there."


def control(kind: type, description: str, value, width: str = "260px", **settings):
    """A control whose whole description is shown."""
    settings = {"layout": widgets.Layout(width=width), "style": WIDE} | settings
    return kind(description=description, value=value, **settings)


def button(description: str, act: Callable[[], None], icon: str = "", kind: str = "") -> widgets.Button:
    """A button that calls ``act`` when it is clicked."""
    made = widgets.Button(description=description, icon=icon, button_style=kind, layout=widgets.Layout(width="auto"))
    made.on_click(lambda _: act())
    return made


def card() -> widgets.Image:
    """A place for a matplotlib figure: a white card with round corners, on light and dark alike."""
    made = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", align_self="flex-start"))
    return made.add_class("funlora-card")


def row(*parts) -> widgets.Box:
    """Controls side by side, wrapping where the window is narrow."""
    return widgets.Box(parts, layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 14px"))


class Panel(widgets.VBox):
    """One panel: controls above a picture; a user's error becomes a sentence in the picture's place."""

    def __init__(self):
        super().__init__()
        self.picture = widgets.HTML()
        self._silent = False

    def on_change(self, act: Callable[[], None], *controls) -> None:
        """Call ``act`` whenever the value of one of the controls changes."""
        for one in controls:
            one.observe(lambda _: self._silent or act(), "value")

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Set several controls as one change, without acting on each."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    def show(self, make: Callable[[], Markup], place: widgets.HTML | None = None) -> None:
        """Put a picture in its place, or the sentence that says why there is none."""
        place = place or self.picture
        try:
            place.value = str(make())
        except LabError as reason:
            place.value = str(problem(reason))


class Job(widgets.VBox):
    """Long work in a thread: a bar, a sentence and a Stop button; one piece of work at a time."""

    def __init__(self, device: torch.device):
        self.bar = widgets.FloatProgress(value=0.0, max=1.0, layout=widgets.Layout(width="320px"))
        self.note = widgets.HTML()
        self.stop_button = button("Stop", self.stop, "stop", "warning")
        self.stop_button.disabled = True
        self._asked, self._thread = threading.Event(), None
        self.runtime = Runtime(device, lambda: STOPPED if self._asked.is_set() else None, save_seconds=5.0)
        super().__init__([row(self.bar, self.stop_button), self.note])

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, work: Callable[[], None]) -> None:
        """Start ``work`` in a thread; it calls ``tell`` and ``runtime.check`` now and then."""
        if self.busy:
            self.note.value = str(problem("This panel is still at work: wait, or press Stop."))
            return
        self._asked.clear()
        self.bar.value, self.bar.bar_style, self.stop_button.disabled = 0.0, "", False
        self.note.value = "Working."
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
            self.bar.value, self.bar.bar_style, self.note.value = 1.0, "success", "Done."
        except Stopped as reason:
            self.bar.bar_style, self.note.value = "warning", str(reason)
        except LabError as reason:
            self.bar.bar_style, self.note.value = "danger", str(problem(reason))
        except Exception as reason:  # a thread has no other way to tell
            self.bar.bar_style = "danger"
            self.note.value = str(problem(f"Something unforeseen went wrong: {type(reason).__name__}: {reason}"))
        finally:
            self.stop_button.disabled = True

    def stop(self) -> None:
        """Ask the work to save and stop."""
        self._asked.set()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the work has ended; for scripts and tests."""
        if self._thread is not None:
            self._thread.join(seconds)

    def tell(self, share: float, sentence: str) -> None:
        self.bar.value, self.note.value = min(max(share, 0.0), 1.0), sentence

    def follow(self, events: Iterator[Event]) -> object:
        """Run a generator of events to its end, showing each; returns what it returns."""
        while True:
            try:
                share, sentence = told(next(events))
            except StopIteration as end:
                return end.value
            self.tell(share, sentence)


def told(event: Event) -> tuple[float, str]:
    """(share of the present stage that is done, a sentence) of one event of a run."""
    match event["event"]:
        case "loss":
            what = f"adapter of class {event['class']}" if "class" in event else f"the {event['stage']}"
            return event["step"] / event["steps"], (
                f"Training {what}: step {event['step']:,} of {event['steps']:,}, loss {event['loss']:.4f}."
            )
        case "samples":
            return event["drawn"] / event["of"], f"Drawing class {event['class']}: {event['drawn']} of {event['of']}."
        case "accuracy":
            return event["task"] / event["of"], f"Task {event['task']} of {event['of']}: {event['average']:.4f}."
    return 0.0, "Working."
