"""The results in the README, written from the stored files in figures/: nothing there is typed.

    python tests/readme_tables.py     rewrites every block between <!-- NAME --> and <!-- end NAME --> in README.md

A block that a stored file no longer supports (a row is gone, say) ends in an error that names the file and the row.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from funlora_lab.adapters import METHODS
from funlora_lab.presets import preset
from funlora_lab.studies import ledger
from funlora_lab.studies.tables import scaled_window
from funlora_lab.systems import meta_unet

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FIGURES = ROOT / "figures"
BLOCK = re.compile(r"<!-- ([a-z][\w-]*) -->(.*?)<!-- end \1 -->", re.DOTALL)
HEAD = "| method | LA | AIA | PPC | recognition | held-out flow loss |\n|---|---|---|---|---|---|"


def results(name: str) -> dict[str, dict]:
    """Method -> what its run reported, of the runs behind notebook 01."""
    return {r["method"]: r for r in json.loads((FIGURES / name / "results.json").read_text())["01 seed 0"]}


class Table:
    """A table that a notebook kept, ``figures/<of>/<name>``, by row and column; numbers are taken as they stand."""

    def __init__(self, name: str, of: str = "digits"):
        self.name, self.path = name, FIGURES / of / f"{name}.csv"
        self.frame = pd.read_csv(self.path, index_col=0, dtype=str)
        self.caption = self.path.with_suffix(".md").read_text().splitlines()[0]

    def of(self, row: str, column: str = "flow loss") -> str:
        """The mean in a cell, without its spread."""
        if row not in self.frame.index or column not in self.frame.columns:
            raise SystemExit(f"{self.path} has no row '{row}' with a column '{column}'.")
        return self.frame.loc[row, column].partition(" ±")[0]

    def sorted(self, names: dict[str, str], column: str = "flow loss") -> str:
        """Rows with their numbers, lowest first: ``names`` is the row's name in the text -> its name in the table."""
        found = {name: self.of(row, column) for name, row in names.items()}
        return ", ".join(f"{name} {found[name]}" for name in sorted(found, key=lambda name: float(found[name])))

    @property
    def link(self) -> str:
        return f"[{self.name}]({self.path.with_suffix('.md').relative_to(ROOT)})"


def methods(name: str) -> str:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = [HEAD]
    for r in results(name).values():
        cells = [*map(shown, (r["LA"], r["AIA"])), f"{r['PPC']:,}" if r["method"] in METHODS else "all weights"]
        lines.append(" | ".join([f"| {r['method']}", *cells, shown(r["recognition"]), f"{shown(r['flow_loss'])} |"]))
    return "\n".join(lines)


def time() -> str:
    r = results("digits")["funlora"]
    return f"about {r['seconds'] / 60:.0f} minutes on {r['provenance']['threads']} CPU cores"


def digits() -> str:
    r = results("digits")["funlora"]
    about = f"One row of {r['PPC']:,} numbers a class, drawn from the same noise after every task: the columns repeat\n"
    about += f"because nothing changed. Seed 0 on digits, {r['provenance']['device'].partition(' ')[0].upper()}"
    return f"{about} (notebook 01, [`results.json`](figures/digits/results.json)):\n\n{methods('digits')}"


def tiny() -> str:
    e, paper = preset("cifar10-tiny"), preset("cifar10")
    weights = sum(value.numel() for name, value in meta_unet(e).named_parameters() if name != "label_emb.weight") / 1e6
    return f"""\
Photographs, without a GPU: `cifar10-tiny` is CIFAR10 at {e.image_size} x {e.image_size} pixels, re-encoded as JPEG, with a U-Net of {weights:.2f} M
weights, {e.base.images:,} images for the base (the paper: {paper.base.images:,}) and {e.adapter.images:,} for a class ({paper.adapter.images:,}). It says how
methods compare on photographs, not what the paper's setting reaches. One seed (notebook 01,
[`results.json`](figures/cifar10-tiny/results.json)):

{methods("cifar10-tiny")}

{prior_tiny()}"""  # noqa: E501


def prior_tiny() -> str:
    """The prior systems on photographs: both accuracies, and what the generator was trained on."""
    table, columns = Table("08-systems", "cifar10-tiny"), ("own LA %", "LA % on samples", "images trained")
    count = re.search(r"(\S+) samples a class", table.caption).group(1)
    lines = [
        f"The prior systems there, one seed, on as many images as FunLoRA (`replay_budget=new`), {count} samples",
        f"a class, notebook 08 ({table.link}):",
        "LA by the classifier that a system trains along, and by a new one of its samples.",
        "JDCL sees the new images of a task twice.",
        "",
        "| system | own LA % | LA % on samples | images trained |",
        "|---|---|---|---|",
    ]
    for row in table.frame.index[table.frame["n"] != "0"]:
        lines.append(" | ".join([f"| {row}", *(table.of(row, column) for column in columns)]) + " |")
    return "\n".join(lines)


def findings() -> str:
    """The findings of the paper that its tables state: every verdict of notebook 06, with its numbers."""
    found, name = pd.read_csv(FIGURES / "digits" / "06-findings.csv", dtype=str).fillna(""), "06-findings"
    preset_name, seeds = re.search(r"Preset (\S+):.* n = (\d+) seed", Table(name).caption).groups()
    counts = found["verdict"].value_counts()
    about = ", ".join(f"{counts.get(word, 0)} {word}" for word in ("shown", "contradicted", "not run"))
    lines = [
        f"What the paper finds in words, on `{preset_name}`, means over {seeds} seeds: {about}.",
        "Contrary results stand as plainly as others. Below are those of its tables, of long orders the three best;",
        f"[{name}](figures/digits/{name}.md) has all of them, with what counts as shown (notebook 06).",
        "Verdicts compare means: a difference within ± (the standard deviation over seeds) decides little.",
        "",
        "| finding of the paper | on digits | numbers |",
        "|---|---|---|",
    ]
    for row in found[found["paper"].str.startswith("Table")].itertuples():
        best, *others = row.ours.split("; ")
        numbers = "; ".join([best, *others[:2]]) or "-"
        lines.append(f"| {row.finding} ({row.paper}) | {row.verdict} | {numbers} |")
    return "\n".join(lines)


def counted() -> str:
    counts = ledger.of_paper()
    two = counts[(counts["row"] == "ratio 2") & (counts["measure"] == "PPC")].iloc[0]
    return f"{two['paper']} for ratio 2 (the formula gives {two['ours']:,})"


def window() -> str:
    """What the preset's window has, and what the one at the place of the paper's 40-54."""
    windows, own, place = Table("02-windows"), preset("digits").window, scaled_window("40-54", preset("digits"))
    pairs = ((windows.of(place, column), windows.of(own, column)) for column in ("PPC", "flow loss", "recognised %"))
    ppc, loss, recognised = pairs
    better = "loses" if float(loss[0]) > float(loss[1]) else "wins"
    text = f"that one, {place}, has {ppc[0]} numbers instead of {ppc[1]} and {better} by held-out loss, "
    return text + f"{loss[0]} against {loss[1]}, with {' % against '.join(recognised)} % recognised ({windows.link})"


BLOCKS: dict[str, Callable[[], str]] = {
    "time": time, "digits": digits, "findings": findings, "tiny": tiny, "counted": counted, "window": window
}  # fmt: skip


def written(text: str) -> str:
    """The README with every block made anew; a block inside a sentence stays on its line."""

    def block(match: re.Match) -> str:
        name, old = match.groups()
        around = "\n\n" if old.startswith("\n") else ""
        return f"<!-- {name} -->{around}{BLOCKS[name]()}{around}<!-- end {name} -->"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    before = README.read_text()
    README.write_text(after := written(before))
    print("README.md is as it was." if before == after else "README.md is rewritten: look at `git diff README.md`.")
    sys.exit(0)
