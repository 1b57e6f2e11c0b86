"""Tables for people: mean and spread in one cell, and the same table as Markdown, CSV and LaTeX."""

from pathlib import Path

import pandas as pd

from funlora_lab.config import Experiment
from funlora_lab.disk import write_atomically
from funlora_lab.studies.pictures import figures_folder

NOT_RUN, NOT_MEASURED = "not run", "not measured"


def cell(value: float, spread: float, n: int, digits: int = 1, scale: float = 1.0) -> str:
    """``97.1 ± 0.4``; the mean alone for n = 1; what is missing is said in words."""
    if not n:
        return NOT_RUN
    if pd.isna(value):
        return NOT_MEASURED
    text = f"{scale * value:.{digits}f}"
    return text if n == 1 or pd.isna(spread) else f"{text} ± {scale * spread:.{digits}f}"


# measure -> (heading, digits, factor)
HEADINGS = {
    "LA": ("LA %", 1, 100),
    "AIA": ("AIA %", 1, 100),
    "recognition": ("recognised %", 1, 100),
    "flow_loss": ("flow loss", 4, 1),
    "seconds": ("seconds", 0, 1),
}


def readable(summary: pd.DataFrame, measures=tuple(HEADINGS)) -> pd.DataFrame:
    """A summary of sweeps as text: one line a row, its PPC, n, and every measure as mean ± standard deviation."""
    lines = {}
    for (_, row), line in summary.iterrows():
        n = int(line["n"])
        texts = {"PPC": f"{line['PPC']:,.0f}" if n else NOT_RUN, "n": n}
        for measure in measures:
            heading, digits, scale = HEADINGS[measure]
            texts[heading] = cell(line[measure], line[f"{measure} sd"], n, digits, scale)
        lines[row] = texts
    return pd.DataFrame.from_dict(lines, orient="index")


def _texts(frame: pd.DataFrame) -> list[list[str]]:
    body = [
        [str(index), *("" if pd.isna(v) else str(v) for v in line)]
        for index, line in zip(frame.index, frame.values, strict=True)
    ]
    return [[frame.index.name or "", *map(str, frame.columns)], *body]


def markdown(frame: pd.DataFrame, caption: str) -> str:
    head, *body = _texts(frame)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join([caption, "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def latex(frame: pd.DataFrame, caption: str) -> str:
    r"""A ``tabular`` inside a ``table``, ready for ``\input``."""

    def escaped(text: str) -> str:
        for sign in "&%#_$":
            text = text.replace(sign, "\\" + sign)
        return text.replace("±", r"$\pm$")

    lines = [" & ".join(map(escaped, line)) + r" \\" for line in _texts(frame)]
    columns = "l" + "r" * len(frame.columns)
    head = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption)}}}", rf"\begin{{tabular}}{{{columns}}}"]
    rules = [r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
    return "\n".join([*head, *rules, r"\end{tabular}", r"\end{table}", ""])


def keep(frame: pd.DataFrame, experiment: Experiment, name: str, caption: str) -> pd.DataFrame:
    """Write ``<name>.md``, ``.csv`` and ``.tex`` to the experiment's folder of figures; hand the table back."""
    folder = figures_folder(experiment)
    contents = {"md": markdown(frame, caption), "csv": frame.to_csv(), "tex": latex(frame, caption)}
    for ending, text in contents.items():
        write_atomically(Path(folder) / f"{name}.{ending}", text.encode())
    return frame
