"""What every panel is made of: one widget that shows HTML in places, and long work in a thread with a bar and a Stop.

A trait named in the HTML is a control's value or a place's content. Nothing else is a widget: a page of panels is a
handful of models, and it runs without a browser, where an ``Output`` or ``interact`` may hang.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import anywidget
from traitlets import TraitType, Unicode

from funlora_lab.errors import LabError, Stopped
from funlora_lab.training import Runtime
from funlora_lab.workbench import controls
from funlora_lab.workbench.images import Watching
from funlora_lab.workbench.markup import bar, problem

HERE = Path(__file__).parent
STOPPED = "Stopped. What was done is saved: the same button goes on from there."


def held(kind: type[TraitType], *arguments) -> TraitType:
    """A trait that the browser and Python share."""
    return kind(*arguments).tag(sync=True)


class Panel(anywidget.AnyWidget):
    """A panel of a workbench; ``renew`` writes its body for the run and the classes that the workbench shows now."""

    _esm, _css = HERE / "panel.js", HERE / "panel.css"
    body, note = held(Unicode), held(Unicode)
    title = "a live panel"

    def __init__(self, bench):
        super().__init__()
        self.bench, self._silent = bench, False
        self.on_msg(lambda _, content, buffers: self.press(content["press"], content.get("value", ""), *buffers))
        self.renew()

    def __repr__(self) -> str:
        return f"{type(self).__name__}, {self.title}: to bring it to life, choose Run, then Run All Cells."

    run = property(lambda self: self.bench.run)
    classes = property(lambda self: [(name, cls) for cls, name in self.run.known.items()])

    def press(self, act: str, value: str = "", *buffers: bytes) -> None:
        """What a button does; a user's error becomes a sentence in ``note``."""
        with self.telling():
            self.note = ""
            getattr(self, f"press_{act}")(*([value] if value or buffers else []), *map(bytes, buffers))

    @contextmanager
    def telling(self):
        try:
            yield
        except LabError as reason:
            self.note = problem(reason)

    def on_change(self, act: Callable[[], None], *names: str) -> None:
        def changed(_) -> None:
            if not self._silent:
                with self.telling():
                    act()

        self.observe(changed, list(names))

    @contextmanager
    def quietly(self):
        """Set several controls as one change, without acting on each; the browser is told of all at once."""
        before, self._silent = self._silent, True
        try:
            with self.hold_sync():
                yield
        finally:
            self._silent = before


class Drawer:
    """One thread that calls ``draw`` for the newest state and skips those in between; ``moved`` says of a newer one."""

    def __init__(self, draw: Callable[[], None]):
        self.draw, self.moved, self.thread = draw, threading.Event(), threading.Thread()

    def wake(self) -> None:
        self.moved.set()
        if not self.thread.is_alive():
            self.thread = threading.Thread(target=self._follow, daemon=True)
            self.thread.start()

    def _follow(self) -> None:
        while self.moved.wait():
            self.moved.clear()
            self.draw()


class Working(Panel):
    """A panel with long work in a thread, one at a time, which its Stop button ends where all is saved."""

    bar, halt, seen = held(Unicode), held(Unicode), held(Unicode)
    work_places = controls.row(controls.place("bar"), controls.place("halt"))

    def __init__(self, bench):
        self.thread, self._asked, self.watching = threading.Thread(), threading.Event(), Watching(self._tell)
        super().__init__(bench)

    @property
    def runtime(self) -> Runtime:
        """One that listens to Stop, and shows how far it is and what is drawn in training."""
        asked = {"stop": lambda: STOPPED if self._asked.is_set() else None, "save_seconds": 5.0}
        return Runtime(self.run.runtime.device, report=self.watching.report, watch=self.watching.watch, **asked)

    def _tell(self, progress: str, seen: str) -> None:
        self.bar, self.seen = progress, seen

    def begin(self, work: Callable[[], None]) -> None:
        if self.thread.is_alive():
            raise LabError("This panel is still at work: wait, or press Stop.")
        self._asked.clear()
        self.watching = Watching(self._tell)
        self._tell(bar(0.0, "Working."), "")
        self.halt = controls.button("stop", "Stop", "halt")
        self.thread = threading.Thread(target=self._work, args=(work,), daemon=True)
        self.thread.start()

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
            end = "Done."
        except Stopped as reason:
            end = str(reason)
        except LabError as reason:
            end = problem(reason)
        except Exception as reason:  # whatever it is, a thread has no other way to report it
            end = problem(f"Something unforeseen went wrong: {type(reason).__name__}: {reason}")
        self.bar, self.halt = f'<div role="status">{end}</div>', ""

    def press_stop(self) -> None:
        self._asked.set()
        self.halt = ""
        self.bar = bar(self.watching.progress.share, "Stopping at the next step.")
