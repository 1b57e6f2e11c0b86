"""The events of a run on a terminal: one bar for the stage at work, one line a task."""

import sys
import time

from tqdm import tqdm


def measured(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


class Progress:
    """Shows the events of a run on a terminal: one bar for the stage at work, one line a task."""

    def __init__(self, stream=None):
        self.stream, self.bar, self.stage = stream or sys.stderr, None, ""

    def close(self, line: str = "") -> None:
        """Take the bar away and print a line, if any."""
        if self.bar is not None:
            self.bar.close()
            self.bar, self.stage = None, ""
        if line:
            print(line, file=self.stream, flush=True)

    def __call__(self, event: dict) -> None:
        """Show one event; those read back from disk move no bar."""
        match event["event"]:
            case "run":
                tasks = " | ".join(" ".join(event["classes"][c] for c in task) for task in event["tasks"])
                self.close(f"{event['preset']}, {event['method']}, seed {event['seed']}; tasks: {tasks}")
            case "loss" if "replayed" not in event:
                stage, note = event["stage"], f"loss {event['loss']:.4f}"
                if "class" in event:  # classes side by side report in turn: one bar serves them all
                    stage, note = "adapters", f"class {event['class']}, {note}"
                elif "classes" in event:
                    stage = f"{stage} of {event['classes']} classes"
                self._advance(stage, event["step"], event["steps"], event["seconds"], note)
            case "samples" if "replayed" not in event:
                self._advance(f"samples of class {event['class']}", event["drawn"], event["of"], event["seconds"])
            case "quality":
                self._advance(f"quality of {event['group']}", event["done"], event["of"], event["seconds"])
            case "cluster":
                note = f"{event['done']} tasks done, {event['running']} running"
                self._advance("all runs on Ray, %", round(100 * event["share"]), 100, event["seconds"], note)
            case "accuracy":
                each = " ".join(f"{value:.3f}" for value in event["per_task"])
                self.close(f"task {event['task']}/{event['of']}: accuracy {event['average']:.4f} (by task: {each})")

    def _advance(self, stage: str, done: int, total: int, seconds: float, note: str = "") -> None:
        """Move the bar of a stage that took ``seconds`` for what is ``done``: by these its speed is shown."""
        begun = time.time() - seconds
        if stage != self.stage or done < self.bar.n:
            self.close()
            # smoothing 0: the speed is that since the beginning; delay: nothing is drawn before the first report
            look = {"leave": False, "dynamic_ncols": True, "smoothing": 0, "miniters": 1, "delay": 1e-3}
            self.stage, self.bar = stage, tqdm(total=total, desc=stage, file=self.stream, **look)
            self.bar.last_print_t = begun
        self.bar.start_t = begun
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)
