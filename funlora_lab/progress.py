"""Events -> lines for a person at a terminal: one bar for the stage at work, one line a task."""

import sys
from typing import TextIO

from tqdm import tqdm

from funlora_lab.training import Event


class Progress:
    """Shows the events of a run on ``stream``; use it as a context manager."""

    def __init__(self, stream: TextIO = sys.stderr):
        self.stream = stream
        self.bar: tqdm | None = None
        self.stage = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar, self.stage = None, ""

    def _advance(self, stage: str, done: int, total: int, note: str) -> None:
        if stage != self.stage:
            self._close()
            self.stage = stage
            self.bar = tqdm(total=total, desc=stage, file=self.stream, leave=False, dynamic_ncols=True)
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)

    def show(self, event: Event) -> None:
        """Draw one event; those read back from disk move no bar."""
        match event["event"]:
            case "run":
                tasks = " | ".join(" ".join(event["classes"][c] for c in task) for task in event["tasks"])
                self._line(f"{event['preset']}, {event['method']}, seed {event['seed']}; tasks: {tasks}")
            case "loss" if "replayed" not in event:
                name, note = f"{event['stage']} ", f"loss {event['loss']:.4f}"
                if "class" in event:  # adapters side by side report in turn: one bar serves them all
                    name, note = "adapters ", f"class {event['class']}, {note}"
                elif "classes" in event:
                    name = f"classifier of {event['classes']} classes "
                self._advance(name, event["step"], event["steps"], note)
            case "samples" if "replayed" not in event:
                self._advance(f"samples of class {event['class']} ", event["drawn"], event["of"], "")
            case "accuracy":
                each = " ".join(f"{value:.3f}" for value in event["per_task"])
                self._line(f"task {event['task']}/{event['of']}: accuracy {event['average']:.4f} (by task: {each})")

    def _line(self, text: str) -> None:
        self._close()
        print(text, file=self.stream, flush=True)
