"""A checklist of the paper's tables: every row and column that it prints, what is measured here, and what is not run.

Made from ``published.layout()``, so that nothing can be left out; ours is read from stored runs.
"""

import pandas as pd

from funlora_lab.studies import fidelity, ledger, published, sweeps, tables
from funlora_lab.studies.cost import seconds_of
from funlora_lab.studies.findings import Stored

DATA = {"cifar10": "CIFAR10 2-2", "cifar100": "CIFAR100 20-20", "cifar100-10": "CIFAR100 10-10"}
DATA |= {"imagenet100": "ImageNet100 20-20"}  # preset -> its column in the paper
OURS = {"II, layers 0-64": "functions_everywhere", "II, layers 40-54": "functions", "IV, operations": "operations"}
OURS |= {"I": "windows", "IV, ratio": "ratios", "V": "methods", "VI": "systems", "supplement, COCO": "coco"}
SYSTEMS = {"DGR": "DGR diffusion"}  # a row of the supplement -> its name in Table VI


def measured(stored: Stored, table: str, row: str, measure: str) -> str:
    """Our value of a published row as text, or "not run"."""
    base = stored.base
    if table == "VII":
        name, images = {"LA": "LA", "seconds": "sampling seconds"}[measure], int(row[1:]) * base.samples_per_class
        cells = stored.budget(name).reindex([images]).iloc[0].dropna() * (100 if measure == "LA" else 1)
        return ", ".join(f"{steps:g} steps {value:.1f}" for steps, value in cells.items()) or sweeps.NOT_RUN
    if table == "supplement, cost" and (runs := row.startswith("FunLoRA") and stored.runs("methods", "funlora")):
        spent = pd.DataFrame([seconds_of(run.run) for run in runs]).mean()
        kinds = {"training h": spent["base"] + spent["generator"], "sampling h": spent["sampling"]}
        return f"{(kinds | {'classifier h': spent['classifier']}).get(measure, spent.sum()):.1f} s"
    if table == "supplement, quality":
        ours = ("systems", SYSTEMS.get(row, row))
        return fidelity.known([cell.run() for cell in stored.cells if (cell.table, cell.row) == ours])[measure]
    if table == "I":
        row = stored.place(row)
    elif table == "IV, operations" and row != "mul":  # from the paper's start
        row = f"{row}, literal start"
    if (OURS.get(table), row) not in stored.summary.index:
        return sweeps.NOT_RUN
    line = stored.summary.loc[(OURS[table], row)]
    if measure in ("LA", "AIA") or not line["n"]:
        return sweeps.cell_text(line.get(measure), line.get(f"{measure} sd"), int(line["n"]), 1, 100)
    numbers = {
        "parameters": f"{ledger.total_parameters(base):,}" if row not in tables.PRIOR else sweeps.NOT_RUN,
        "images of storage": f"{4 * line['PPC'] / (base.channels * base.image_size**2):.0f}",
        "PPC": "all weights" if row in published.BOUNDS else f"{line['PPC']:,.0f}",
    }
    return numbers[measure]


def lines(stored: Stored) -> pd.DataFrame:
    """One line a table, row and measure: the published numbers by column, ours, and the columns that are not run."""
    found, here = [], DATA.get(stored.base.preset, "")
    for table, row, measure, columns in published.layout():
        ours = measured(stored, table, row, measure)
        theirs = ", ".join(f"{column} {number or 'lost'}" for column, number in columns.items())
        rest = [column for column in columns if ours == sweeps.NOT_RUN or not here.startswith(column)]
        about = {"table": table, "row": row, "measure": measure, "published": theirs}
        found.append(about | {f"ours, {stored.base.preset}": ours, sweeps.NOT_RUN: ", ".join(rest)})
    return pd.DataFrame(found).set_index("table")


def counts(checklist: pd.DataFrame) -> pd.DataFrame:
    """For every table: its rows and lines, how many lines are measured here, how many are not run."""
    ours = next(column for column in checklist if column.startswith("ours"))
    grouped = checklist.assign(run=checklist[ours] != sweeps.NOT_RUN).groupby(level=0, sort=False)
    counted = grouped.agg(rows=("row", "nunique"), lines=("run", "size"), measured=("run", "sum"))
    return counted.assign(**{sweeps.NOT_RUN: counted["lines"] - counted["measured"]})
