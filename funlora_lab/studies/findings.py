"""Every finding that the paper puts into words: shown or contradicted by the stored runs of a preset, with its numbers.

Nothing is trained here. What is not stored is nan, and a finding whose numbers hold a nan is "not run". What counts as
shown stands in the finding's words. LA and AIA are in per cent; the windows named are the paper's, and stand for their
places in the network at hand.
"""

from collections.abc import Iterator, Sequence
from functools import cache, cached_property

import pandas as pd

from funlora_lab.continual import OpenRun, open_run
from funlora_lab.experiment import Experiment
from funlora_lab.store import read_json
from funlora_lab.studies import keep, learned, ledger, published, sweeps, tables

SHOWN, CONTRADICTED, NAN = "shown", "contradicted", float("nan")
DECIDING = ("windows", "functions", "functions_everywhere", "operations", "ratios", "methods", "systems")
BY = {"LA": "LA", "AIA": "AIA", "flow_loss": "held-out loss"}
Finding = tuple[str, str, str, bool, str]  # where it stands, its words, its numbers as published, true here?, ours


class Stored:
    """The results of a preset's tables, and of ``more`` cells, as far as they are stored."""

    def __init__(self, base: Experiment, seeds: Sequence[int], device: str = "auto", more: Sequence[tables.Cell] = ()):
        self.base, self.device, self.cells = base, device, [*tables.cells(DECIDING, base, seeds), *more]
        self.runs = cache(self._runs)

    summary = cached_property(lambda self: sweeps.summary(sweeps.collect(self.cells)))

    def of(self, table: str, row: str, measure: str = "LA") -> float:
        """The mean over seeds; nan where nothing is stored or measured."""
        scale = 100 if measure.startswith(("LA", "AIA")) else 1
        return scale * self.summary.loc[(table, row), measure] if (table, row) in self.summary.index else NAN

    def place(self, window: str) -> str:
        return tables.scaled_window(window, self.base)

    def layers(self, window: str) -> range:
        first, last = map(int, self.place(window).split("-"))
        return range(first, last + 1)

    def losses(self, table: str, *rows: str) -> str:
        known = ", ".join(f"{self.of(table, row, 'flow_loss'):.4f}" for row in rows)
        return f"; flow loss {known}" if self.base.valid_fraction else ""

    def best(self, table: str, rows: Sequence[str], measure: str) -> tuple[str, str]:
        """(the best of some rows, all of them with their numbers and spread, the best first)."""
        values, digits = {row: self.of(table, row, measure) for row in rows}, sweeps.MEASURES[measure][1]
        if pd.isna(list(values.values())).any():
            return "", "nan"
        order = sorted(values, key=values.get, reverse=measure != "flow_loss")
        spread = {row: self.of(table, row, f"{measure} sd") for row in rows}
        return order[0], "; ".join(f"{row} {sweeps.cell_text(values[row], spread[row], 2, digits)}" for row in order)

    def _runs(self, table: str, row: str) -> list[OpenRun]:
        """The runs of a row, of every seed; none where one is missing."""
        wanted = [cell for cell in self.cells if (cell.table, cell.row) == (table, row)]
        return [] if sweeps.missing(wanted) else [open_run(cell.experiment, self.device) for cell in wanted]

    def kept(self, name: str) -> list[dict]:
        """What a notebook of this preset has kept under a name that begins so (``keep.results``)."""
        path = keep.folder(self.base) / "results.json"
        results = read_json(path) if path.exists() else {}
        return next((results[known] for known in sorted(results) if known.startswith(name)), [])

    def budget(self, measure: str = "LA") -> pd.DataFrame:
        """Notebook 05's cells of RK4: images a class (lines), steps (columns)."""
        cells = self.kept("05 seed")
        rk4 = [cell | {"steps": int(cell["setting"])} for cell in cells if cell["solver"] == "rk4"]
        frame = pd.DataFrame(rk4, columns=["images", "steps", measure]).astype(float)
        return frame.pivot(index="images", columns="steps", values=measure)


def _table_i(s: Stored) -> Iterator[Finding]:
    everywhere, ours, middle, early = (s.place(window) for window in ("0-64", "40-54", "25-44", "15-44"))
    LA = {window: s.of("windows", window) for window in (everywhere, ours, middle, early)}
    lost = LA[everywhere] - LA[ours]
    words = "layers 40-54 alone lose about 2 points of LA (4 at most)"
    yield "Table I", words, "about 2", lost <= 4, f"{lost:.1f} lost{s.losses('windows', everywhere, ours)}"
    lost = [LA[everywhere] - LA[window] for window in (early, middle)]
    words, ours_lost = "without 45-54 (in 15-44, in 25-44) 5 points are lost (2.5 at least)", "{:.1f}, {:.1f} lost"
    yield "Table I", words, "5", min(lost) >= 2.5, ours_lost.format(*lost) + s.losses("windows", early, middle)
    both = f"LA {LA[middle]:.1f} against {LA[ours]:.1f}{s.losses('windows', middle, ours)}"
    yield "Table I", "25-44, with more numbers, is less accurate than 40-54", "", LA[middle] < LA[ours], both


def _fig_3(s: Stored) -> Iterator[Finding]:
    runs, parts = s.runs("windows", s.place("0-64")), pd.Series(learned.parts(s.base))
    frame = learned.importances(runs) if runs else pd.DataFrame(columns=["layer", "class", "importance"])
    mean = frame.groupby("layer")["importance"].mean().astype(float).reindex(parts.index)
    ends, by_part = mean.iloc[[0, -1]] / mean.max(), mean.groupby(parts).mean().sort_values(ascending=False)
    words = "importance is near zero at the first and the last layer (below a quarter of the top)"
    yield "Fig. 3", words, "", ends.max() < 0.25, f"{ends.iloc[0]:.0%} and {ends.iloc[1]:.0%} of the top"
    high, said = set(by_part.index[:2]) == {"middle", "decoder"}, (f"{p} {value:.2f}" for p, value in by_part.items())
    yield "Fig. 3", "it is highest in the middle and the decoder", "", high, ", ".join(said)
    for words, window, among in (
        ("layers 25-44 lead", "25-44", mean),
        ("in the encoder 8-15 matter most", "8-15", mean[parts == "encoder"]),
    ):
        inside = among.index.isin(s.layers(window))
        here, there = among[inside].mean(), among[~inside].mean()
        yield "Fig. 3", words, "", here > there, f"{here:.2f} against {there:.2f} elsewhere"
    spread = frame.groupby(["layer", "class"])["importance"].mean().groupby("layer").std() / mean
    words = "it hardly differs between classes (standard deviation below a quarter of a layer's mean)"
    yield "Fig. 3", words, "", spread.median() < 0.25, f"{spread.median():.0%}, median layer"


def _table_ii(s: Stored) -> Iterator[Finding]:
    for table, where in (("functions_everywhere", "all layers"), ("functions", "the window")):
        for measure, name in BY.items():
            best, order = s.best(table, list(published.FUNCTIONS), measure)
            words = f"in {where} the learned cosine is the best function, by {name}"
            yield "Table II", words, "", best == "cosine, learned", order
        gained = s.of(table, "cosine, learned") - s.of(table, "cosine, frozen")
        losses = s.losses(table, "cosine, learned", "cosine, frozen")
        yield "Table II", f"in {where} learning the frequencies helps, by LA", "", gained > 0, f"{gained:+.1f}{losses}"
    rows = [s.runs("functions", row) for row in ("cosine, learned", "shift", "power, learned")]
    cosine, shift, power = (learned.ranks(runs)["rank"].max() if runs else NAN for runs in rows)
    true = cosine > s.base.functions and shift == s.base.functions and power < shift / 2
    words = "the rank of the cosine passes the number of functions, shift's equals it, power's stays below half"
    yield "Fig. 4", words, "15, 10, 4", true, f"at most {cosine}, {shift}, {power}"


def _fig_5(s: Stored) -> Iterator[Finding]:
    for row, start in (("cosine, learned", "identity"), ("cosine, learned, literal start", "literal")):
        runs, columns = s.runs("functions", row), ["layer", "function", "value"]
        none = pd.DataFrame({"layer": 0, "function": range(1, s.base.functions + 1), "value": NAN})
        of = {name: learned.series(runs, name)[columns] if runs else none for name in ("ponderation", "frequency")}
        size = of["ponderation"].assign(value=of["ponderation"]["value"].abs()).groupby("function")["value"].mean()
        low, high = size.iloc[: len(size) // 2].mean(), size.iloc[len(size) // 2 :].mean()
        numbers = f"mean size {low:.2f} in the lower half of the functions, {high:.2f} in the upper (a tenth counts)"
        yield "Fig. 5", f"ponderations fall with the function's index ({start} start)", "", high < 0.9 * low, numbers
        group = {w: of["frequency"].query("layer in @where", local_dict={"where": list(s.layers(w))}) for w in GROUPS}
        mean = {w: frame.groupby("function")["value"].mean() for w, frame in group.items()}
        slope = {w: values.iloc[2:].diff().mean() for w, values in mean.items()}
        words = (
            f"frequencies of layers 40-44 are alike from the third on ({start} start; at most half the first slope, 1)"
        )
        yield "Fig. 5", words, "", slope["40-44"] < 0.5, f"slope {slope['40-44']:.3f}"
        words = f"those of layers 45-52 stay a dampened ramp ({start} start; slope between 0 and 1)"
        yield "Fig. 5", words, "", 0 < slope["45-52"] < 1, f"slope {slope['45-52']:.3f}"
        last, before = mean["53-54"].mean(), mean["45-52"].mean()
        words = f"those of layers 53-54 stay low ({start} start; mean below half of that of 45-52)"
        yield "Fig. 5", words, "", last < before / 2, f"mean {last:.2f} against {before:.2f}"


GROUPS = ("40-44", "45-52", "53-54")  # of layers, in which Fig. 5 is described


def _table_iv(s: Stored) -> Iterator[Finding]:
    LA = {row: s.of("operations", row) for row in tables.operations(s.base)}
    for row, words, least, most in (
        ("add", "add collapses (below half of mul's LA) from the start of Sec. 5.2", 0, 0.5),
        ("mul-add", "mul-add does not (above nine tenths of it)", 0.9, 2),
    ):
        share = LA[f"{row}, literal start"] / LA["mul"]
        ours = f"{LA[f'{row}, literal start']:.1f} of {LA['mul']:.1f}; from the identity {LA[row]:.1f}"
        numbers = "{:.2f} of {:.2f}".format(*(published.OPERATIONS["CIFAR10"][name] for name in (row, "mul")))
        yield "Table IV", words, numbers, least <= share <= most, ours
    lost = {measure: s.of("ratios", "1", measure) - s.of("ratios", "16", measure) for measure in ("AIA", "LA")}
    ours = f"{lost['AIA']:.1f} of AIA, {lost['LA']:.1f} of LA{s.losses('ratios', '1', '16')}"
    yield "Table IV", "sixteen times shorter A and B cost 6 points of AIA (9 at most)", "6", lost["AIA"] <= 9, ours


def _tables_v_vi(s: Stored) -> Iterator[Finding]:
    compared = [method for method in published.METHODS if method != "label-embedding"]
    for measure, name in BY.items():
        best, order = s.best("methods", compared, measure)
        yield "Table V", f"FunLoRA is the best adapter, by {name}", "by up to 1 point", best == "funlora", order
    v1, v2, attention = (s.of("methods", row) for row in ("lora-conv-v1", "lora-conv-v2", "lora-attention"))
    words, ours = "convolutions beat attention as the place for LoRA", f"{v1:.1f}, {v2:.1f} against {attention:.1f}"
    yield "Table V", words, "", min(v1, v2) > attention, ours
    bound, LA, least = (s.of("methods", row) for row in ("generative-multitask", "funlora", "label-embedding"))
    words = "FunLoRA's LA comes close to the generative upper bound (within 5 points)"
    yield "Table V", words, "", bound - LA < 5, f"{LA:.1f} of {bound:.1f}; vanilla conditioning {least:.1f}"
    one, ten = (s.of("systems", row) for row in ("FunLoRA", "FunLoRA, 10x samples"))
    words = "ten times the samples gain 8 points (4 at least)"
    yield "Table VI", words, "7.82", ten - one >= 4, f"{one:.1f}, {ten:.1f}"
    best, order = s.best("systems", ["FunLoRA", *tables.PRIOR], "LA")
    yield "Table VI", "FunLoRA beats the prior systems", "", best == "FunLoRA", order if tables.PRIOR else "nan"


def _table_vii(s: Stored) -> Iterator[Finding]:
    LA = 100 * s.budget()
    few, many = (LA.iloc[i].mean() if len(LA) > 1 else NAN for i in (0, -1))
    ours = f"{many - few:+.1f}, {LA.index.tolist()} images a class"
    yield "Table VII", "more images buy accuracy (2 points at least)", "+8.5 for 10 times", many - few >= 2, ours
    few, many = (LA.iloc[:, i].mean() if len(LA.columns) > 1 else NAN for i in (0, -1))
    words, ours = "steps beyond a few buy nothing (2 points at most)", f"{many - few:+.1f}, {LA.columns.tolist()} steps"
    yield "Table VII", words, "+1.5 from 3 to 20", abs(many - few) <= 2, ours


# decided by other notebooks, which keep [{"true": ..., "ours": ...}] under "finding KEY": (where, KEY, words)
ELSEWHERE = (
    (
        "Sec. 5.3",
        "speed",
        "sampling a flow is faster than sampling the diffusion rivals (by evaluations of one network)",
    ),
    ("Sec. 4.2", "tuned", "a class can be tuned again alone when its images change"),
)


def _text(s: Stored) -> Iterator[Finding]:
    claims = ledger.of_paper().query("table == 'text'")
    true, ours = set(claims["verdict"]) == {"equal", "below"}, str(claims["ours"].tolist())
    words = "80 classes cost 2.3 % of the base, 1,000 more stay below the rivals"
    yield "Sec. 5.3", words, "2.3%, 52.4M, 295M", true, ours
    for where, key, words in ELSEWHERE:
        record = (s.kept(f"finding {key}") or [{"true": False, "ours": "nan"}])[0]
        yield where, words, "", record["true"], record["ours"]


def table(stored: Stored) -> pd.DataFrame:
    """One line a finding: its verdict, where the paper says it, the finding, its published numbers, ours."""
    lines = []
    for part in (_table_i, _fig_3, _table_ii, _fig_5, _table_iv, _tables_v_vi, _table_vii, _text):
        for where, words, numbers, true, ours in part(stored):
            verdict = sweeps.NOT_RUN if "nan" in ours else SHOWN if true else CONTRADICTED
            ours = "" if verdict == sweeps.NOT_RUN else ours
            lines.append({"verdict": verdict, "paper": where, "finding": words, "published": numbers, "ours": ours})
    return pd.DataFrame(lines).set_index("verdict")


def said(found: pd.DataFrame) -> str:
    """How many findings are shown, contradicted and not run, and each that is contradicted with its numbers."""
    counts = found.index.value_counts()
    words = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in (SHOWN, CONTRADICTED, sweeps.NOT_RUN))
    against = found[found.index == CONTRADICTED]
    return "\n".join([f"{words}. Contradicted:", *(f"- {row.finding}: {row.ours}" for row in against.itertuples())])
