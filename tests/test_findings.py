"""Findings and checklist: verdicts follow stored numbers, and nothing that the paper tabulates is left out."""

import pandas as pd
import pytest

from funlora_lab import preset
from funlora_lab.studies import checklist, findings, keep, published, sweeps, tables

BASE = tables.base_of("digits")


@pytest.fixture
def stored(monkeypatch):
    """stored(changes): every row of every table of seed 0 with LA 0.9, AIA 0.9, flow loss 0.5, apart from changes."""

    def stored(changes=None, base=BASE):
        found = findings.Stored(base, [0], "cpu")
        frame = sweeps.collect(found.cells)
        frame[["LA", "AIA", "flow_loss", "PPC", "seconds"]] = 0.9, 0.9, 0.5, 100.0, 1.0
        for (table, row), values in (changes or {}).items():
            where = (frame["table"] == table) & (frame["row"] == row)
            assert where.any(), (table, row)
            frame.loc[where, list(values)] = list(values.values())
        monkeypatch.setattr(sweeps, "collect", lambda cells: frame)
        return found

    return stored


def verdict(found: pd.DataFrame, words: str) -> str:
    (at,) = (i for i, finding in enumerate(found["finding"]) if words in finding)
    return found.index[at]


def test_without_runs_everything_but_arithmetic_is_not_run():
    found = findings.table(findings.Stored(BASE, [0], "cpu"))
    assert len(found) >= 35
    assert found[found.index != sweeps.NOT_RUN]["finding"].tolist() == [
        "80 classes cost 2.3 % of the base, 1,000 more stay below the rivals"
    ]
    assert (found.loc[sweeps.NOT_RUN, "ours"] == "").all()


def test_verdicts_follow_the_numbers_either_way(stored):
    same = findings.table(stored())
    for words in ("40-54 alone lose", "ten times the samples", "without 45-54", "add collapses"):
        assert verdict(same, words) == ("shown" if "alone" in words else "contradicted")
    assert "25-44, with more numbers, is less accurate" in findings.said(same)
    changes = {
        ("windows", "16-20"): {"LA": 0.8},
        ("windows", "5-17"): {"LA": 0.8}, ("windows", "11-17"): {"LA": 0.7},
        ("operations", "add, literal start"): {"LA": 0.2}, ("operations", "mul-add, literal start"): {"LA": 0.3},
        ("systems", "FunLoRA, 10x samples"): {"LA": 0.95}, ("ratios", "16"): {"AIA": 0.85},
        ("functions", "cosine, learned"): {"LA": 0.91, "flow_loss": 0.6}, ("methods", "lora-attention"): {"LA": 0.5},
    }  # fmt: skip
    found = findings.table(stored(changes))
    shown = ("without 45-54", "less accurate than 40-54", "add collapses", "ten times the samples", "sixteen times")
    shown += ("in the window the learned cosine is the best function, by LA", "convolutions beat attention")
    for words in shown:
        assert verdict(found, words) == "shown", words
    for words in (
        "40-54 alone lose",
        "mul-add does not",
        "in the window the learned cosine is the best function, by held",
    ):
        assert verdict(found, words) == "contradicted", words
    assert "10.0 lost; flow loss 0.5000, 0.5000" in found["ours"].iloc[0]


def test_the_budget_is_read_from_the_kept_results(stored):
    cells = [
        {"solver": "rk4", "setting": f"{steps}", "images": images, "LA": 0.5 + images / 1000, "sampling seconds": 2.0}
        for steps in (1, 4) for images in (80, 160)
    ]  # fmt: skip
    keep.results(BASE, "05 seed 0", cells)
    one = stored()
    found = findings.table(one)
    assert verdict(found, "more images buy accuracy") == verdict(found, "steps beyond a few") == "shown"
    lines = checklist.lines(one).loc["VII"].set_index(["row", "measure"])["ours, digits-small"]
    assert lines["x1", "LA"] == "1 steps 58.0, 4 steps 58.0"
    assert lines["x2", "seconds"] == "1 steps 2.0, 4 steps 2.0"
    assert lines["x10", "LA"] == sweeps.NOT_RUN


def test_the_checklist_holds_every_row_and_column_of_the_paper(stored):
    listed = checklist.lines(stored())
    counts = checklist.counts(listed)
    scores, rows = 3, counts["rows"].to_dict()
    assert rows == {
        "I": 11, "II, layers 0-64": 7, "II, layers 40-54": 7, "IV, operations": 3, "IV, ratio": 5, "V": 8, "VI": 8,
        "VII": 7, "supplement, cost": 7, "supplement, quality": 3, "supplement, COCO": 5,
    }  # fmt: skip
    assert counts["lines"].loc[["I", "II, layers 0-64", "V"]].tolist() == [11 * scores, 7 * scores, 8 * scores]
    columns = {table: set() for table in rows}
    for table, _, _, some in published.layout():
        columns[table] |= set(some)
    assert columns["V"] == {"CIFAR10 2-2", "CIFAR100 20-20", "ImageNet100 20-20"}
    assert columns["VI"] == {"CIFAR10 2-2", "CIFAR100 20-20", "CIFAR100 10-10", "ImageNet100 20-20", "all"}
    assert columns["VII"] == {"CIFAR100", *(f"NFE={n}" for n in (2, 3, 4, 5, 6, 10, 20))}
    ours = listed["ours, digits-small"]
    assert (ours != "").all()
    for table in ("I", "II, layers 0-64", "II, layers 40-54", "IV, operations", "IV, ratio", "V"):
        assert (ours.loc[table] != sweeps.NOT_RUN).all(), table
    assert (listed["not run"] != "").all(), "digits is none of the paper's data sets"
    assert counts[sweeps.NOT_RUN].loc["supplement, quality"] == 9


def test_on_a_preset_of_the_paper_its_own_columns_are_run(stored):
    base = preset("cifar100")
    changes = {("methods", "funlora"): {"LA": 0.6}}
    listed = checklist.lines(stored(changes, base)).loc["V"].set_index(["row", "measure"])
    assert listed.loc[("funlora", "LA"), "ours, cifar100"] == "60.0"
    assert listed.loc[("funlora", "LA"), "not run"] == "CIFAR10 2-2, ImageNet100 20-20"
