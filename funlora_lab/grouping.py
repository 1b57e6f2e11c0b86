"""Does a class's adapter depend on its place in the order, on its companions, or on the process? Measured here."""

import shutil
import tempfile
from pathlib import Path

import pandas as pd

from funlora_lab import data
from funlora_lab.adapters import Row
from funlora_lab.config import Experiment
from funlora_lab.disk import fingerprint
from funlora_lab.generators import generator_of
from funlora_lab.store import Store
from funlora_lab.training import Runtime
from funlora_lab.work import Work


def adapters_of(experiment: Experiment, home: Path, runtime: Runtime | None = None) -> dict[int, Row]:
    """Train (or load) only the base and the adapters of an experiment, in ``home``; the row of each class."""
    dataset = data.load(experiment, home)
    tasks = data.tasks(experiment, len(dataset.classes))
    learner = generator_of(Work(experiment, dataset, tasks, Store(home), runtime or Runtime()))
    for task in range(len(tasks)):
        for _ in learner.learn(task):
            pass
    return dict(learner.rows)


def difference(a: Row, b: Row) -> float:
    """The largest absolute difference between the numbers of two rows."""
    return max((float((a[name] - b[name]).abs().max()) for name in a), default=0.0)


def grouping_table(experiment: Experiment, variants: dict[str, dict]) -> pd.DataFrame:
    """Train the adapters of every variant anew over one base; compare each with the experiment as it is.

    ``variants``: name -> changed fields, which must leave the base as it is (class_order beyond task 1, lanes, and a
    split with the same task 1). One line a variant: classes, how many are bit-identical, the largest difference.
    Trains in a temporary folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "reference"
        reference = adapters_of(experiment, first)
        rows = []
        for number, (name, changes) in enumerate(variants.items()):
            home = Path(folder) / f"variant-{number}"
            for base in (first / "artefacts").glob("network-*"):
                shutil.copytree(base, home / "artefacts" / base.name)
            found = adapters_of(experiment.but(**changes), home)
            rows.append(
                {
                    "variant": name,
                    "classes": len(found),
                    "bit-identical": sum(fingerprint(found[cls]) == fingerprint(reference[cls]) for cls in found),
                    "largest difference": max(difference(found[cls], reference[cls]) for cls in found),
                }
            )
    return pd.DataFrame(rows).set_index("variant")
