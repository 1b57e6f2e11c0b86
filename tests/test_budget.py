"""The sampling budget: nested samples, a table of cells and its front, words that cannot be read."""

import shutil

import pandas as pd
import pytest
import torch

from funlora_lab import LabError, open_run, preset
from funlora_lab.flow import Solver, noise
from funlora_lab.studies import budget, published


@pytest.fixture(scope="module")
def run(smoke_home, tmp_path_factory):
    home = shutil.copytree(smoke_home, tmp_path_factory.mktemp("budget") / "home")
    return open_run(preset("smoke"), "cpu", home=home)


@pytest.fixture(scope="module")
def swept(run):
    """(chunks that were drawn, table) of two samplers and three numbers of images a class."""
    folder = run.run.folder.parent / "artefacts"
    before = set(folder.glob("samples-*/chunk-*"))
    table = budget.sweep(run, budget.samplers("midpoint 2, euler 3"), [2, 20, 5])
    return set(folder.glob("samples-*/chunk-*")) - before, table


def test_dopri5_each_and_dopri5_agree_on_the_network(run):
    velocity, x0 = run.source(8).velocity(), noise(0, 8, 0, (4, 1, 8, 8))
    with torch.no_grad():
        each, once = (Solver(name, tolerance=1e-5).integrate(velocity, x0) for name in ("dopri5-each", "dopri5"))
    assert (each[0] - once[0]).abs().max() < 2e-3
    assert 7 < each[1] < 200


def test_a_sweep_draws_every_image_once_and_its_own_cell_is_the_run(run, swept):
    drawn, table = swept
    assert len(drawn) == 10  # midpoint 2 is the run's own sampler; euler draws one chunk of each of ten classes
    assert table["images"].tolist() == [2, 5, 20] * 2
    assert table["setting"].tolist() == ["2"] * 3 + ["3"] * 3
    assert table["evaluations"].tolist() == [4.0] * 3 + [3.0] * 3
    assert table["total evaluations"].tolist() == [8, 20, 80, 6, 15, 60]
    own = table.iloc[2]
    assert own["LA"] == pytest.approx(run.results["LA"])
    assert own["recognition"] == pytest.approx(run.results["recognition"])
    assert (table["sampling seconds"].diff().drop([0, 3]) > 0).all()


def test_repeats_train_the_classifier_again_on_the_same_images(run, swept):
    cell = budget.score(run, repeats=2, samples_per_class=5)
    assert cell["spread"] >= 0
    assert swept[1]["spread"].isna().all()


def test_images_beyond_the_runs_own_chunk_go_on_from_the_same_first_ones(run):
    few, many = run.samples(8, 6), run.samples(8, 60)  # three chunks
    assert torch.equal(few, many[:6])
    assert len(many.unique(dim=0)) == 60


def test_figures_show_a_panel_a_number_of_images_and_both_tables(run, swept):
    panels = budget.plot_lines(swept[1], run.results["LA"]).axes
    assert [axis.get_title() for axis in panels] == [f"{n} images a class" for n in (2, 5, 20)]
    theirs, ours, *scales = budget.plot_tables(swept[1]).axes
    assert [scale.get_ylabel() for scale in scales] == ["LA, per cent"] * 2
    assert theirs.texts[0].get_text() == "56.3"
    assert [label.get_text() for label in ours.get_xticklabels()] == ["midpoint\n2 (4)", "euler\n3 (3)"]
    front = budget.pareto(swept[1], "total evaluations", "LA")
    (axis,) = budget.plot_front(swept[1], front, "total evaluations", "LA", "evaluations a class").axes
    assert [text.get_text() for text in axis.texts] == [str(i) for i in range(1, len(front) + 1)]


def test_the_front_holds_what_nothing_beats():
    table = pd.DataFrame({"cost": [1, 2, 3, 2, 4], "LA": [0.5, 0.7, 0.6, 0.8, 0.9]})
    assert budget.pareto(table, "cost", "LA").index.tolist() == [0, 3, 4]


def test_samplers_and_multiples_that_cannot_be_read_are_named(run):
    read = [{"solver": "rk4", "steps": 2}, {"solver": "dopri5-each", "tolerance": 0.01}]
    assert budget.samplers("rk4 2, dopri5-each 1e-2, rk4 2") == read
    for text in ("heun 2", "rk4", "rk4 0.5"):
        with pytest.raises(LabError, match=f"'{text}' is not a sampler"):
            budget.samplers(text)
    assert budget.counts("1, 1e-1", run) == [2, 20]
    for text in ("0", "many"):
        with pytest.raises(LabError, match=f"multiples={text}"):
            budget.counts(text, run)


def test_the_papers_grid_is_the_default_on_its_benchmark():
    fixed, adaptive, cheap, dear, multiples = budget.grid(preset("cifar100"), "", "", "", "", "")
    assert [f"{s['solver']} {s['steps']}" for s in budget.samplers(fixed)] == [f"rk4 {n}" for n in published.BUDGET]
    assert budget.samplers(adaptive) == []
    assert [int(word) for word in multiples.split(",")] == list(published.BUDGET.index)
    assert {cheap, dear} <= set(fixed.split(", "))
    small = budget.grid(preset("digits"), "rk4 3", "", "", "", "")
    assert small == ("rk4 3", *budget.SMALL[1:])


def test_seconds_of_sampling_stand_beside_the_papers_row(swept):
    seconds = budget.seconds(swept[1], 20)
    assert seconds.loc["published, CIFAR100", ["x1", "x10"]].tolist() == [115, 1148]
    assert seconds.loc["euler 3", "x1"] >= seconds.loc["euler 3", "x0.1"] >= 0


def test_table_vii_says_that_ten_times_the_images_buy_eight_points():
    table = published.BUDGET
    assert table.shape == (7, 7)
    assert table.loc[10, 6] - table.loc[1, 6] > 8
    assert table.loc[1, 20] - table.loc[1, 3] < 2
