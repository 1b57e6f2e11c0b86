"""Tables of many runs: what they hold, that stored runs are reused, that an interrupted table goes on; what is kept."""

import multiprocessing
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from funlora_lab import LabError, open_run, preset
from funlora_lab.__main__ import main
from funlora_lab.adapters import METHODS
from funlora_lab.experiment import Experiment
from funlora_lab.store import UNFINISHED, Run, read_json
from funlora_lab.studies import cost, keep, plots, pretraining, published, sweeps, tables
from funlora_lab.systems import SYSTEMS

# the paper's windows of 65 convolutions at the same places of 25
PLACES = "0-24 2-20 5-17 5-20 11-17 11-20 14-20 16-20 17-20 16-19 17-19".split()
TINY = preset("smoke").but(
    multipliers=(1,), window="4-7", base_images=64, adapter_images=32, samples_per_class=4, chunk=4, classifier_epochs=1
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(home, cells, lines said) of two rows for two seeds, done in two processes."""
    folder, said = tmp_path_factory.mktemp("home"), []
    wanted = [
        tables.Cell("small", method, TINY.but(method=method, seed=seed, score_after="last"))
        for method in ("funlora", "vanilla-mul")
        for seed in (0, 1)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)
        prepare = partial((folder / "prepared").mkdir, exist_ok=True)
        sweeps.perform(wanted, "cpu", folder, show=said.append, each=said.append, prepare=prepare)
    return folder, wanted, said


def test_where_nothing_is_held_out_the_column_is_empty_and_choices_are_those_of_digits():
    paper, digits = tables.base_of("cifar100"), tables.base_of("digits")
    assert (tables.compared_by(paper), tables.compared_by(digits)) == ("LA", "flow_loss")
    assert tables.panels(digits).keys() - tables.panels(paper).keys() == {"flow_loss"}
    assert "Nothing is held out" in sweeps.describe(paper, [0])
    assert "held out" not in sweeps.describe(digits, [0])
    assert tables.rates(paper) == {}
    assert sweeps.status([]).empty
    assert sweeps.summary(sweeps.collect([])).empty
    assert tables.functions(paper)["shift"].adapter.lr == tables.functions(digits)["shift"].adapter.lr == 0.3
    assert tables.functions(paper.but(adapter_lr=0.01))["shift"].adapter.lr == 0.01, "a rate that is given stays"
    line = {"table": "t", "row": "r", "PPC": 7.0, "rate": 0.1} | dict.fromkeys(sweeps.MEASURES, 0.5)
    shown = sweeps.readable(sweeps.summary(pd.DataFrame([line | {"flow_loss": float("nan")}])))
    assert shown.loc["r", ["flow loss", "LA %"]].tolist() == ["", "50.0"]


def test_every_task_is_scored_where_the_paper_has_AIA():
    cells = tables.cells(list(tables.TABLES), tables.base_of("digits"), [0])
    scored = {cell.table: cell.experiment.score_after for cell in cells}
    every = {"windows", "functions", "functions_everywhere", "ratios", "methods"}
    assert {name for name, after in scored.items() if after == "every"} == every
    assert {scored[name] for name in ("rates", "growth")} == {"none"}


def test_a_method_of_ones_own_is_no_row_of_the_papers_table(monkeypatch):
    monkeypatch.setitem(METHODS, "own", replace(METHODS["kml"], name="own"))
    assert "own" not in tables.methods(preset("smoke"))
    assert "kml" in tables.methods(preset("smoke"))


def test_a_sweep_trains_one_base_a_seed_and_finishes_every_run(swept):
    folder, wanted, said = swept
    bases = [p for p in (folder / "artefacts").glob("network-*") if (p / "result.safetensors").exists()]
    assert len(bases) == 2
    assert all(cell.run(folder).results() for cell in wanted)
    assert re.fullmatch(r"4 runs: 0 stored, 4 to do in about \d+ s, 2 at once", said[0])
    assert len(said) == 4 + 2
    assert (folder / "prepared").exists()


def test_a_finished_sweep_does_nothing(swept):
    folder, wanted, _ = swept
    before, said = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}, []
    sweeps.perform(wanted, "cpu", folder, show=said.append)
    assert said == ["4 runs, all stored"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert sweeps.estimate(wanted, "cpu", folder) == 0


def test_status_and_estimate_know_what_remains(swept):
    folder, wanted, _ = swept
    more = [*wanted, tables.Cell("small", "shift", TINY.but(method="shift", score_after="last"))]
    assert sweeps.status(more, folder).loc["small"].tolist() == [5, 4, 1]
    costs = [cost.seconds_of(cell.run(folder)) for cell in wanted]
    own = [sum(spent.values()) - spent["base"] for spent in costs]
    assert sweeps.estimate(more, "cpu", folder) == pytest.approx(sum(own) / len(own))
    assert all(min(spent.values()) > 0 for spent in costs)


@pytest.mark.parametrize("method", ["classifier-multitask", "self-replay"])
def test_seconds_of_every_system_add_up_without_the_judge(swept, method):
    run = open_run(TINY.but(method=method), "cpu", home=swept[0])
    spent, tasks = cost.seconds_of(run.run), run.costs
    assert sum(spent.values()) == pytest.approx(run.results["seconds"])
    for kind, column in (("sampling", "sample"), ("classifier", "classify")):
        if method == "classifier-multitask" or kind == "classifier":
            assert spent[kind] == pytest.approx(tasks[column].sum(), abs=0.02)
    assert (spent["sampling"] > tasks["sample"].iloc[0]) == (method == "self-replay")
    if method == "classifier-multitask":
        assert spent["generator"] == pytest.approx(0, abs=0.02)
    else:
        seconds, images = cost.plot_growth({method: tasks}).axes
        assert len(seconds.patches) == 9
        assert [bar.get_height() for bar in images.patches] == (tasks["images"] / 1000).tolist()


def test_a_table_has_one_line_a_row_with_its_n_and_spread(swept):
    folder, wanted, _ = swept
    more = [*wanted, tables.Cell("small", "shift", TINY.but(method="shift"))]
    summary = sweeps.summary(sweeps.collect(more, folder))
    assert summary["n"].tolist() == [2, 2, 0]
    first = [wanted[i].run(folder).results()["flow_loss"] for i in (0, 1)]
    assert summary["flow_loss"].iloc[0] == pytest.approx(sum(first) / 2)
    assert summary["flow_loss sd"].iloc[0] == pytest.approx(abs(first[0] - first[1]) / 2**0.5)
    text = sweeps.readable(summary)
    assert "±" in text.loc["funlora", "flow loss"]
    assert text.loc["funlora", "AIA %"] == sweeps.NOT_MEASURED  # scored after the last task only
    assert set(text.loc["shift"].drop("n")) == {sweeps.NOT_RUN}
    plain = summary.droplevel("table")
    assert plots.dots(plain, {"flow_loss": "loss"}).axes[0].get_xlabel() == "loss"
    points = tables.plot_cost_and_score(plain.dropna(subset="PPC"), "flow_loss", "loss").axes[0]
    assert {text.get_text() for text in points.texts} == {"funlora", "vanilla-mul"}


def test_paired_differences_are_taken_seed_by_seed(swept):
    folder, wanted, _ = swept
    frame = sweeps.collect(wanted, folder)
    losses = frame.pivot(index="seed", columns="row", values="flow_loss")
    found = sweeps.paired(frame, "funlora").loc["vanilla-mul"]
    assert found["mean"] == pytest.approx((losses["vanilla-mul"] - losses["funlora"]).mean())
    assert found["n"] == 2


def test_the_chosen_rate_of_every_method_is_ringed():
    frame = pd.DataFrame({"name": list("aab"), "rate": [0.1, 0.01, 0.1], "flow_loss": [0.4, 0.5, 0.6]})
    rings = tables.plot_rates(frame).axes[0].lines[1::2]
    assert [ring.get_xydata().tolist() for ring in rings] == [[[0.1, 0.4]], [[0.1, 0.6]]]


@pytest.mark.parametrize("scored", ["every", "none"])
def test_what_is_scored_changes_no_image_and_every_run_has_its_pictures(swept, scored):
    """The classifier is no part of the generator: adapters and samples are those of the same run scored otherwise."""
    folder, wanted, _ = swept
    e, events = wanted[0].experiment, []
    run = open_run(e.but(score_after=scored), "cpu", events.append, folder)
    other = open_run(e, "cpu", home=folder)
    assert not [event for event in events if event.get("stage") == "adapter" and "replayed" not in event]
    for name in ("flow_loss", "recognition"):
        assert run.results[name] == other.results[name]
    assert run.results["LA"] == (other.results["LA"] if scored == "every" else None)
    assert (run.results["AIA"] is None) == (scored == "none")
    assert run.run != other.run
    drawn = keep.pictures(other)
    assert list(drawn) == ["samples", "losses", "accuracy", "confusion"]
    assert list(keep.pictures(run)) == list(drawn)[: 4 if scored == "every" else 2]
    (line,) = drawn["accuracy"].axes[0].lines
    assert pd.Series(line.get_ydata()).isna().tolist() == [True, True, False]  # only the last task was scored


def test_pictures_that_were_broken_off_do_not_count(swept):
    run = open_run(swept[1][0].experiment, "cpu", home=swept[0])
    assert run.run.pictures == []
    paths = keep.save_pictures(run)
    assert run.run.pictures == sorted(paths)
    (run.run.folder / UNFINISHED).touch()
    assert run.run.pictures == []


def test_an_error_in_one_process_ends_the_sweep_in_a_sentence(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # quicker than a fresh interpreter, which ``swept`` has
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    damaged = Run.of(TINY, tmp_path)
    damaged.folder.mkdir()
    damaged.config_file.write_text("{")
    with pytest.raises(LabError, match=r"config\.json is damaged"):
        list(sweeps.side_by_side([TINY], 1, "cpu", tmp_path))
    with pytest.raises(LabError, match="A process of the sweep was killed"):
        list(sweeps.side_by_side([TINY], 1, "cpu", tmp_path, partial(os._exit, 1)))


@pytest.mark.parametrize("name", tables.TABLES)
@pytest.mark.parametrize("of", ["smoke", "digits", "cifar10"])
def test_every_table_holds_experiments_that_differ(name, of):
    rows = tables.TABLES[name](tables.base_of(of))
    assert len(set(rows.values())) == len(rows) >= (0 if (name, of) == ("rates", "cifar10") else 2)
    assert all(isinstance(experiment, Experiment) for experiment in rows.values())


def test_tables_of_the_paper_have_its_rows():
    assert list(tables.windows(preset("cifar10"))) == list(published.WINDOWS)
    assert list(tables.windows(preset("smoke"))) == [*dict.fromkeys(PLACES), preset("smoke").window]
    assert list(tables.functions_everywhere(preset("cifar100"))) == list(published.FUNCTIONS)
    assert set(published.FUNCTIONS) <= set(tables.functions(preset("digits")))
    assert tables.functions(preset("cifar100"))["vanilla add, rank 1 and 2"].extra_rank == (48, 50)
    assert [int(row) for row in tables.ratios(preset("cifar100"))] == list(published.RATIOS)
    methods = tables.methods(preset("cifar10"))
    assert set(published.METHODS) <= set(methods)
    assert [name for name in methods if name in SYSTEMS] == ["classifier-multitask", "generative-multitask"]
    assert not {"power", "shift", "cosine-frozen"} & set(methods)


def test_changed_settings_have_a_folder_of_figures_of_their_own():
    digits = preset("digits")
    assert keep.folder_name(digits) == keep.folder_name(tables.base_of("digits")) == "digits"
    assert keep.folder_name(digits.but(seed=3, method="power", data_root="/elsewhere")) == "digits"
    changed = tables.base_of("digits", ["base_channels=32", "adapter_images=64"])
    assert re.fullmatch("digits-[0-9a-f]{8}", keep.folder_name(changed))
    assert keep.folder_name(changed) == keep.folder_name(changed.but(seed=1, data_root="/elsewhere"))
    assert keep.folder_name(changed) != keep.folder_name(changed.but(adapter_images=65))


def test_tables_are_written_in_three_forms(tmp_path):
    frame = pd.DataFrame({"LA %": ["97.1 ± 0.4", sweeps.NOT_RUN], "n": [2, None]}, index=["fun_lora", "other"])
    keep.table(frame, preset("smoke"), "06-x", "A caption of 100 %")
    text = {path.suffix: path.read_text() for path in (tmp_path / "figures" / "smoke").iterdir()}
    assert "| fun_lora | 97.1 ± 0.4 | 2.0 |" in text[".md"]
    assert "| other | not run |  |" in text[".md"]
    assert r"fun\_lora & 97.1 $\pm$ 0.4 & 2.0 \\" in text[".tex"]
    assert r"\caption{A caption of 100 \% $\pm$: standard deviation over seeds.}" in text[".tex"]
    assert r"\centering" in text[".tex"]
    assert text[".tex"].count(r"\hline") == 3
    csv = pd.read_csv(tmp_path / "figures" / "smoke" / "06-x.csv", index_col=0)
    assert csv.loc["other", "LA %"] == sweeps.NOT_RUN


def test_results_of_many_writers_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: keep.results(preset("smoke"), f"notebook {i}", [{"LA": i}]), range(16)))
    kept = read_json(tmp_path / "figures" / "smoke" / "results.json")
    assert kept == {f"notebook {i}": [{"LA": i}] for i in range(16)}


def test_the_command_plans_some_rows_only_and_leaves_nothing_behind(tmp_path, capsys):
    words = ["sweep", "smoke", "--tables", "ratios,methods", "--row", "2", "--row", "kml", "--seeds", "2", "--plan"]
    assert main([*words, "--set", "base_images=64", "--set", "multipliers=1", "--set", "window=4-7"]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["ratios", "2", "0", "2"] in lines
    assert ["methods", "2", "0", "2"] in lines
    assert float(re.search(r"takes about (\d+) s", said)[1]) >= 0
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "nosuch"], "Unknown preset 'nosuch'"),
        (["sweep", "smoke", "--tables", "nosuch"], "Unknown table 'nosuch': accepted are windows, functions"),
        (["sweep", "smoke", "--tables", "ratios", "--row", "3"], "Unknown row '3': accepted are 1; 2; 4; 8"),
        (["sweep", "smoke", "--set", "nosuch=1"], "Unknown setting 'nosuch'"),
    ],
)
def test_bad_words_are_refused_before_anything_runs(words, message, tmp_path, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_a_base_trained_first_on_unlabelled_pictures_stands_beside_the_plain_one():
    small = preset("smoke").but(score_after="last", base_images=64, adapter_images=32, pretrain_images=0)
    base = pretraining.rehearsed(small)
    assert pretraining.rehearsed(small) == base
    assert preset("cifar10") == pretraining.rehearsed(preset("cifar10")), "only digits rehearse"
    wanted = tables.cells(["coco"], base, [0])
    names = ["FunLoRA", "FunLoRA, COCO", "FunLoRA, 10x samples", "FunLoRA, COCO, 10x samples"]
    assert [cell.row for cell in wanted] == names
    sweeps.perform(wanted[:2], "cpu")
    runs = {row: sweeps.open_row(wanted[:2], row, "cpu")[0] for row in names[:2]}
    assert runs["FunLoRA, COCO"].context.dataset.unlabelled.pixels.unique(dim=0).shape == (600, 1, 8, 8)
    assert [len(run.losses("pretrain")) for run in runs.values()] == [0, 1]
    table = pretraining.table(sweeps.readable(sweeps.summary(sweeps.collect(wanted)), ["LA"]))
    assert table["pre-trained"].tolist() == ["no", "yes", "no", "yes"]
    assert table["LA %"].str.fullmatch(r"\d+\.\d|not run").all()
    alone = pretraining.table(sweeps.readable(sweeps.summary(sweeps.collect(tables.cells(["coco"], small, [0])))))
    assert alone.loc["FunLoRA, COCO", "LA %"] == pretraining.NOT_GIVEN
