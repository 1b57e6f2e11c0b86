"""What a run costs: seconds by kind of work, and how a task's cost grows with the tasks before it."""

import pandas as pd

from funlora_lab.store import Run
from funlora_lab.studies.plots import COLOURS, Drawing, drawing


def seconds_of(run: Run) -> dict[str, float]:
    """Seconds of a finished run: training of the base, of the rest of the generator, sampling, classifiers."""
    base, samples, classifiers, judged = 0.0, {}, {}, False
    for event in run.events():
        if event["event"] == "samples" and event["drawn"] == event["of"]:
            samples[event["class"], event["seconds"]] = event["seconds"]  # a class drawn anew cost as much again
        elif event["event"] == "loss" and event["stage"] == "base":
            base = event["seconds"]
        elif event["event"] == "loss" and event["stage"] == "classifier":
            if judged:
                classifiers[event["classes"]] = event["seconds"]
            judged |= event["step"] == event["steps"]  # the first classifier is the judge, no part of the method
    parts = {"base": base, "sampling": sum(samples.values()), "classifier": sum(classifiers.values())}
    return {"generator": run.results()["seconds"] - sum(parts.values()), **parts}


def plot_growth(costs: dict[str, pd.DataFrame]) -> Drawing:
    """Seconds of every task by kind of work, and images trained on; one group of bars a method (-> its run's costs)."""
    figure, axes = drawing(9.6, 3.3, 1, 2)
    (seconds, images), width = axes[0], 0.8 / len(costs)
    for i, (name, table) in enumerate(costs.items()):
        place, below = table["task"] + (i - (len(costs) - 1) / 2) * width, 0.0
        for kind, shade in (("train", 1.0), ("sample", 0.6), ("classify", 0.3)):
            seconds.bar(place, table[kind], 0.92 * width, below, color=COLOURS[i], alpha=shade, label=f"{name}: {kind}")
            below += table[kind].to_numpy()
        images.bar(place, table["images"] / 1000, 0.92 * width, color=COLOURS[i], label=name)
    for axis, label in ((seconds, "seconds of the task"), (images, "images trained on, thousands")):
        axis.set(xticks=list(table["task"]), xlabel="task", ylabel=label, ylim=(0, 1.4 * axis.get_ylim()[1]))
        axis.legend(frameon=False, fontsize=7.5, loc="upper left", ncols=len(costs))
    return figure
