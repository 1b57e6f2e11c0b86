"""What a sampling budget buys: solver, steps and images a class against accuracy, time and network evaluations.

Samples are nested (the first n of a larger set are the set of n), so a sweep over numbers of images draws each image
once, and every solver starts from the same noise. LA needs the last task's classifier alone, one for every cell.
"""

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean, stdev

import pandas as pd
import torch

from funlora_lab import classifier, continual
from funlora_lab.config import SOLVERS
from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun, exhaust
from funlora_lab.sampling import draw

EVALUATIONS_A_STEP = {"euler": 1, "midpoint": 2, "rk4": 4}  # of torchdiffeq's fixed-grid solvers

# Table VII of the paper: CIFAR100, 20 classes a task, RK4. LA in per cent by (multiple of the real images, column).
# The columns are headed "NFE" there; a step of RK4 takes four evaluations, so 2 or 3 of them can only be steps.
PUBLISHED_STEPS = (2, 3, 4, 5, 6, 10, 20)
PUBLISHED_LA = {
    1: (56.27, 57.96, 58.79, 59.23, 58.72, 59.99, 59.42),
    2: (60.01, 62.81, 63.11, 63.73, 63.37, 63.34, 63.15),
    3: (61.61, 63.65, 64.91, 64.72, 64.82, 64.96, 65.14),
    4: (62.49, 65.04, 65.59, 65.87, 65.58, 65.45, 65.43),
    5: (63.00, 65.85, 66.25, 66.26, 66.73, 66.77, 66.34),
    6: (63.56, 65.92, 66.09, 66.47, 66.33, 66.40, 66.60),
    10: (64.79, 67.25, 67.90, 67.57, 68.00, 67.83, 67.63),
}
PUBLISHED_SECONDS = {1: 115, 2: 229, 3: 344, 4: 459, 5: 576, 6: 689, 10: 1148}  # of sampling, by multiple


def published() -> pd.DataFrame:
    """Table VII in long form: images (as a multiple of the real ones), steps, evaluations an image, LA in [0, 1]."""
    return pd.DataFrame(
        {"multiple": multiple, "steps": steps, "evaluations": EVALUATIONS_A_STEP["rk4"] * steps, "LA": LA / 100}
        for multiple, row in PUBLISHED_LA.items()
        for steps, LA in zip(PUBLISHED_STEPS, row, strict=True)
    )


def samplers(text: str) -> list[dict]:
    """``"euler 4, dopri5 1e-3"`` -> the settings of each sampler, named twice or not, once.

    Raises LabError naming what it cannot read.
    """
    found = []
    for words in (part.split() for part in text.split(",")):
        try:
            name, number = words
            if name not in SOLVERS:
                raise ValueError
            adaptive = name.startswith("dopri5")
            found.append({"solver": name} | ({"tolerance": float(number)} if adaptive else {"steps": int(number)}))
        except ValueError:
            raise LabError(
                f"'{' '.join(words)}' is not a sampler: accepted is a solver ({', '.join(SOLVERS)}) with its steps or, "
                "for dopri5 and dopri5-each, its tolerance, as in euler 4, dopri5 1e-3."
            ) from None
    return [settings for i, settings in enumerate(found) if settings not in found[:i]]


def counts(text: str, opened: OpenRun) -> list[int]:
    """``"0.1, 1"`` -> images a class, as multiples of the run's own number; raises LabError for one not above 0."""
    try:
        shares = [float(word) for word in text.split(",")]
        if min(shares) <= 0:
            raise ValueError
    except ValueError:
        raise LabError(f"multiples={text}: accepted are numbers above 0 joined by commas, such as 0.1, 1.") from None
    return sorted({max(1, round(share * opened.experiment.samples_per_class)) for share in shares})


def score(opened: OpenRun, repeats: int = 1, **changes) -> dict:
    """One cell: the run's generator sampled with other settings, and the last task's classifier trained on that.

    ``changes`` are settings of the experiment (solver, steps, tolerance, samples_per_class, classifier_epochs). The
    classifier is trained ``repeats`` times with seeds of its own on the same images: LA is the mean, ``spread`` the
    standard deviation (nan for one). Seconds are what drawing and training took when they were first done.
    """
    e = opened.experiment.but(**changes)
    work = replace(opened.work, experiment=e, seconds={})
    everything = [cls for classes in opened.tasks for cls in classes]
    new = everything[len(opened.tasks[0]) :]
    sources, samples, drawing, evaluations = {}, {}, 0.0, []
    for cls in everything:
        sources[cls] = opened.source(cls)
        stage = continual.sample_stage(work, sources[cls], cls)
        events, (samples[cls], seconds) = _collected(
            draw(stage, sources[cls].velocity, e, cls, e.samples_per_class, opened.runtime)
        )
        drawing += seconds * e.samples_per_class / (len(events) * e.chunk)  # of a last chunk only what is used
        evaluations += [event["evaluations"] for event in events]
    answers = {cls: torch.tensor(everything)[classifier.predict(opened.judge, samples[cls])] for cls in new}
    accuracies = []
    for repeat in range(repeats):
        again = replace(work, experiment=e.but(seed=e.seed + repeat))
        images, origin = continual.synthetic(work, sources, samples)
        _, predicted, true = exhaust(continual.train_classifier(again, everything, images, origin))
        accuracies.append(mean(continual.accuracy_per_task(predicted, true, opened.tasks)))
    return {
        "solver": e.solver,
        "setting": f"{e.tolerance:g}" if e.solver.startswith("dopri5") else str(e.steps),
        "images": e.samples_per_class,
        "evaluations": mean(evaluations),
        "LA": mean(accuracies),
        "spread": stdev(accuracies) if repeats > 1 else float("nan"),
        "recognition": mean((answers[cls] == cls).double().mean().item() for cls in new),
        "sampling seconds": drawing,
        "classifier seconds": work.total_seconds / repeats,
    }


def _collected(events: Iterator[dict]) -> tuple[list[dict], object]:
    """(all events of a generator, what it returns)."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as end:
            return seen, end.value


def sweep(opened: OpenRun, samplers: list[dict], counts: list[int], repeats: int = 1) -> pd.DataFrame:
    """``score`` of every sampler with every number of images a class: one line a cell."""
    cells = [score(opened, repeats, samples_per_class=n, **sampler) for sampler in samplers for n in sorted(counts)]
    table = pd.DataFrame(cells)
    table["total evaluations"] = table["evaluations"] * table["images"]  # for one class
    return table


def pareto(table: pd.DataFrame, cost: str, gain: str) -> pd.DataFrame:
    """The lines that no other beats in both: rising ``gain`` for rising ``cost``, cheapest first."""
    ordered = table.sort_values([cost, gain], ascending=[True, False])
    best = ordered[gain].cummax().shift(fill_value=float("-inf"))
    return ordered[ordered[gain] > best]
