"""Tables of many runs: what they hold, that stored runs are reused, that an interrupted table goes on."""

import re

import pytest
import torch

from funlora_lab import continual
from funlora_lab.__main__ import main
from funlora_lab.config import Experiment
from funlora_lab.errors import LabError
from funlora_lab.opened import exhaust, open_run
from funlora_lab.presets import preset
from funlora_lab.store import Run
from funlora_lab.studies import adapter_plots, designs, pictures, sweeps, tables

TINY = preset("smoke").but(
    base_images=64,
    adapter_images=32,
    samples_per_class=4,
    chunk=4,
    classifier_epochs=1,
    functions=3,
    valid_fraction=0.1,
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two rows, two seeds, done in two processes."""
    folder = tmp_path_factory.mktemp("home")
    wanted = [
        designs.Cell("small", method, TINY.but(method=method, seed=seed, score_after="last"))
        for method in ("funlora", "vanilla-mul")
        for seed in (0, 1)
    ]
    said: list[str] = []
    sweeps.perform(wanted, "cpu", folder, show=said.append, each=said.append)
    return folder, wanted, said


def test_tables_that_compare_losses_want_images_held_out():
    with pytest.raises(LabError, match=r"Tables of cifar10 .* valid_fraction=0 holds none out.* valid_fraction=0\.02"):
        designs.compared_base("cifar10")
    assert designs.compared_base("cifar10", ["valid_fraction=0.02"]).valid_fraction == 0.02
    for name in ("digits", "cifar10-quick"):
        assert designs.compared_base(name) == designs.base_of(name)


def test_a_sweep_trains_one_base_a_seed_and_finishes_every_run(swept):
    folder, wanted, said = swept
    bases = [p for p in (folder / "artefacts").glob("network-*") if (p / "result.safetensors").exists()]
    assert len(bases) == 2
    assert all(cell.run(folder).results() for cell in wanted)
    assert "4 to do in about" in said[0]
    assert len(said) == 4 + 2


def test_a_finished_sweep_does_nothing(swept):
    folder, wanted, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    said: list[str] = []
    sweeps.perform(wanted, "cpu", folder, show=said.append)
    assert said == ["4 runs, all stored"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert sweeps.estimate(wanted, "cpu", folder) == 0


def test_status_and_estimate_know_what_remains(swept):
    folder, wanted, _ = swept
    more = [*wanted, designs.Cell("small", "shift", TINY.but(method="shift", score_after="last"))]
    assert sweeps.status(more, folder).loc["small"].tolist() == [5, 4, 1]
    costs = [sweeps.costs(cell.run(folder)) for cell in wanted]
    own = [sum(cost.values()) - cost["base"] for cost in costs]
    assert sweeps.estimate(more, "cpu", folder) == pytest.approx(sum(own) / len(own))
    assert all(cost["generator"] > 0 and cost["sampling"] > 0 and cost["classifier"] > 0 for cost in costs)


def test_a_table_has_one_line_a_row_with_its_n_and_spread(swept):
    folder, wanted, _ = swept
    more = [*wanted, designs.Cell("small", "shift", TINY.but(method="shift"))]
    summary = sweeps.summary(sweeps.collect(more, folder))
    assert summary["n"].tolist() == [2, 2, 0]
    first = [wanted[i].run(folder).results()["flow_loss"] for i in (0, 1)]
    assert summary["flow_loss"].iloc[0] == pytest.approx(sum(first) / 2)
    text = tables.readable(summary)
    assert "±" in text.loc["funlora", "flow loss"]
    assert text.loc["funlora", "AIA %"] == tables.NOT_MEASURED  # scored after the last task only
    assert set(text.loc["shift"].drop("n")) == {tables.NOT_RUN}
    assert adapter_plots.dots(summary.droplevel("table"), {"flow_loss": "loss"}).axes[0].get_xlabel() == "loss"


def test_paired_differences_are_taken_seed_by_seed(swept):
    folder, wanted, _ = swept
    frame = sweeps.collect(wanted, folder)
    losses = frame.pivot(index="seed", columns="row", values="flow_loss")
    found = sweeps.paired(frame, "funlora").loc["vanilla-mul"]
    assert found["mean"] == pytest.approx((losses["vanilla-mul"] - losses["funlora"]).mean())
    assert found["n"] == 2


@pytest.mark.parametrize("scored", ["every", "none"])
def test_what_is_scored_changes_no_image(swept, scored):
    """The classifier is no part of the generator: adapters and samples are those of the same run scored otherwise."""
    folder, wanted, _ = swept
    e = wanted[0].experiment
    events = list(continual.run(e.but(score_after=scored), home=folder))
    result, other = events[-1], wanted[0].run(folder).results()
    assert not [event for event in events if event.get("stage") == "adapter" and "replayed" not in event]
    assert result["flow_loss"] == other["flow_loss"]
    assert result["recognition"] == other["recognition"]
    assert (result["LA"] is None) == (scored == "none")
    assert (result["AIA"] is None) == (scored == "none")
    if scored == "every":
        assert result["LA"] == other["LA"]
    assert Run.of(e, folder) != Run.of(e.but(score_after=scored), folder)


def test_classes_of_later_tasks_may_train_beside(tmp_path, swept):
    """More lanes than new classes: all later classes at once, each as if its task had come alone."""
    folder, wanted, _ = swept
    e = wanted[0].experiment
    together = open_run(e.but(lanes=8), "cpu", home=tmp_path)
    alone = open_run(e, "cpu", home=folder)
    for cls in (6, 7, 8, 9):
        for name, value in alone.row(cls).items():
            assert torch.allclose(value, together.row(cls)[name], atol=1e-4), (cls, name)


def test_an_error_in_one_process_ends_the_sweep_with_its_message(tmp_path):
    wanted = [designs.Cell("bad", str(seed), TINY.but(seed=seed, window="11-99")) for seed in (0, 1)]
    with pytest.raises(LabError, match="accepted are layer indices"):
        sweeps._work(wanted[0].experiment, "cpu", tmp_path, 1)
    with pytest.raises(LabError, match="accepted are layer indices"):
        exhaust(sweeps._side_by_side([cell.experiment for cell in wanted], 2, "cpu", tmp_path))


def test_unknown_tables_are_refused():
    with pytest.raises(LabError, match="accepted are windows, functions"):
        designs.cells(["nosuch"], TINY, [0])


@pytest.mark.parametrize("name", list(designs.TABLES))
@pytest.mark.parametrize("of", ["smoke", "digits", "cifar10"])
def test_every_table_holds_experiments_that_differ(name, of):
    rows = designs.TABLES[name](designs.base_of(of))
    assert len(set(rows.values())) == len(rows) >= 4
    assert all(isinstance(experiment, Experiment) for experiment in rows.values())


def test_table_one_of_the_paper_has_its_windows():
    assert list(designs.windows(preset("cifar10"))) == designs.PAPER_WINDOWS


def test_changed_settings_have_a_folder_of_figures_of_their_own():
    digits = preset("digits")
    assert pictures.place(digits) == pictures.place(designs.base_of("digits")) == "digits"
    assert pictures.place(digits.but(seed=3, method="power", data="folder", data_root="/elsewhere")) == "digits"
    changed = designs.base_of("digits", ["base_channels=32", "adapter_images=64"])
    assert re.fullmatch("digits-[0-9a-f]{8}", pictures.place(changed))
    assert pictures.place(changed) == pictures.place(changed.but(seed=1, data_root="/elsewhere"))
    assert pictures.place(changed) != pictures.place(changed.but(adapter_images=65))


def test_tables_are_written_in_three_forms(tmp_path, monkeypatch):
    import pandas as pd

    monkeypatch.setenv("FUNLORA_FIGURES", str(tmp_path))
    frame = pd.DataFrame({"LA %": ["97.1 ± 0.4", tables.NOT_RUN]}, index=["fun_lora", "other"])
    tables.keep(frame, preset("smoke"), "06-x", "A caption of 100 %")
    text = {path.suffix: path.read_text() for path in (tmp_path / "smoke").iterdir()}
    assert "| fun_lora | 97.1 ± 0.4 |" in text[".md"]
    assert r"fun\_lora & 97.1 $\pm$ 0.4 \\" in text[".tex"]
    assert r"100 \%" in text[".tex"]
    assert pd.read_csv(tmp_path / "smoke" / "06-x.csv", index_col=0).loc["other", "LA %"] == tables.NOT_RUN


def test_the_command_plans_some_rows_only(capsys):
    words = ["sweep", "smoke", "--tables", "ratios,methods", "--row", "2", "--row", "kml", "--seeds", "2", "--plan"]
    assert main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ratios", "2", "0", "2"] in lines
    assert ["methods", "2", "0", "2"] in lines


def test_the_command_plans_a_sweep_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path))
    assert main(["sweep", "smoke", "--tables", "operations,ratios", "--seeds", "1", "--plan"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"operations\s+5\s+0\s+5", said)
    assert float(re.search(r"takes about (\d+) s", said)[1]) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "nosuch"], "Unknown preset 'nosuch'"),
        (["sweep", "smoke", "--tables", "nosuch"], "Unknown table 'nosuch'"),
        (["sweep", "smoke", "--seeds", "0"], "seeds=0: accepted"),
        (["sweep", "smoke", "--tables", "ratios", "--row", "3"], "Unknown row '3': accepted are 1; 2; 4; 8"),
        (["sweep", "smoke", "--set", "nosuch=1"], "Unknown setting 'nosuch'"),
    ],
)
def test_bad_words_are_refused_before_anything_runs(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path))
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
