"""What learned numbers say: tables of the smoke run, its rows set by hand or drawn at random, and their figures."""

import shutil

import pytest
import torch

from funlora_lab import LabError, open_run, preset
from funlora_lab.adapters import METHODS, Adapters
from funlora_lab.studies import learned, tables
from funlora_lab.unet import conv_layers


@pytest.fixture(scope="module")
def run(smoke_home, tmp_path_factory):
    """The finished smoke run, opened in a copy of its home; its rows may be changed in memory."""
    home = shutil.copytree(smoke_home, tmp_path_factory.mktemp("learned") / "home")
    return open_run(preset("smoke"), "cpu", home=home)


@pytest.fixture
def bent(run, monkeypatch):
    """bent(method, change, settings): the run as if that method had learned ``change(row)`` of its first numbers."""

    def bent(method, change=lambda row: row, **settings):
        adapters = Adapters(run.network, run.experiment.but(method=method, **settings))
        rows = {cls: change(adapters.start(cls)) for cls in (6, 7, 8, 9)}
        monkeypatch.setattr(run.generator, "adapters", adapters)
        monkeypatch.setattr(run.generator, "rows", rows)
        return run

    return bent


def scattered(row):
    """A and B drawn around 1, everything else as it started."""
    generator = torch.Generator().manual_seed(0)
    noise = {key: torch.randn(value.shape, generator=generator) for key, value in row.items()}
    return {key: value + 0.5 * noise[key] if key[-2:] in ("/A", "/B") else value for key, value in row.items()}


def test_importances_name_every_adapted_layer_and_new_class(bent):
    run = bent("vanilla-mul", lambda row: {key: value + 0.25 * key.endswith("/A") for key, value in row.items()})
    run.generator.rows[6] = run.adapters.start(6)
    table = learned.importances([run])
    assert list(table.columns) == ["seed", "class", "layer", "importance"]
    assert sorted(table["layer"].unique()) == list(range(11, 24))
    assert (table[table["class"] == "6"]["importance"] == 0).all()
    assert set(table["class"]) == set("6789")
    assert table[table["class"] != "6"]["importance"].tolist() == pytest.approx([0.25] * 39)
    parts = learned.parts(run.experiment)
    heat, line, _ = learned.plot_importance(table, parts).axes
    assert [text.get_text() for text in heat.texts] == ["encoder", "middle", "decoder"]
    assert line.lines[0].get_ydata()[0] == pytest.approx(0.75 * 0.25)


@pytest.mark.parametrize(
    ("method", "settings", "bound"),
    [
        ("vanilla-mul", {}, 1),
        ("vanilla-mul", {"rank": 2}, 2),
        ("shift", {"functions": 6}, 6),
        ("power-frozen", {"functions": 6}, 6),
        ("power", {"functions": 6, "ratio": 2}, 4),  # 8 inputs or outputs, 4 entries
        ("cosine-frozen", {"functions": 2}, 8),
        ("funlora", {"ratio": 4}, 2),
    ],
)
def test_ranks_stay_within_the_bound_of_their_formula(bent, method, settings, bound):
    table = learned.ranks([bent(method, scattered, **settings)], 1e-12)
    assert (table["rank"] <= table["bound"]).all()
    assert table["bound"].min() == bound
    assert (table["effective"] <= table["rank"] + 1e-9).all()
    if method == "cosine-frozen":
        assert table["rank"].max() > 2  # cosines of a product pass the number of functions
    elif "rank" not in settings:  # the second pair is zero at its start
        assert table["rank"].max() == table["bound"].max()


def test_first_rows_have_rank_one_and_start_where_the_series_say(bent):
    run = bent("funlora")
    assert (learned.ranks([run])["rank"] == 1).all()
    for name in ("ponderation", "frequency"):
        series = learned.series([run], name)
        assert (series["value"] == series["first"]).all()
        assert len(series) == 4 * 13 * run.experiment.functions
    assert (series["value"] == series["function"]).all()
    spectra = learned.spectra([run])
    assert (spectra[spectra["position"] == 1]["value"] == 1).all()
    assert spectra[spectra["position"] > 1]["value"].max() < 1e-6


def test_figures_of_ranks_spectra_and_series_show_every_line_and_layer(bent):
    run = bent("funlora", scattered)
    ranks, spectra = ({"cosine": table} for table in (learned.ranks([run]), learned.spectra([run])))
    axis = learned.plot_ranks(ranks).axes[0]
    assert axis.get_xticks().tolist() == list(range(11, 24))
    assert axis.get_ylim()[1] > ranks["cosine"]["bound"].max()
    assert axis.lines[0].get_ydata().tolist() == ranks["cosine"].groupby("layer")["rank"].mean().tolist()
    assert learned.plot_spectra(spectra, 1e-5).axes[0].get_yscale() == "log"
    grown = ranks["cosine"].assign(method="funlora", steps=8)
    assert learned.plot_growth(grown).axes[0].lines[0].get_xdata().tolist() == [8]
    titles = [axis.get_title() for axis in learned.plot_series(learned.series([run], "frequency"), "f").axes]
    assert [title for title in titles if title] == [f"layer {i}" for i in range(11, 24)]


def test_a_method_without_an_F_has_no_ranks(bent):
    with pytest.raises(LabError, match="The method kml has no F"):
        learned.ranks([bent("kml")])


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_is_the_base_network_at_step_0(run, method):
    assert learned.start_difference(run, run.experiment.but(method=method)) < 1e-4


def test_the_literal_cosine_start_is_not_the_base_network(run):
    assert learned.start_difference(run, run.experiment.but(start="literal")) > 1e-2


def test_parts_follow_the_network(run):
    words = learned.parts(preset("cifar10"))
    assert [words.count(part) for part in ("encoder", "middle", "decoder", "output")] == [21, 4, 39, 1]
    assert len(learned.parts(run.experiment)) == len(conv_layers(run.network))


def test_windows_of_the_paper_keep_their_place():
    assert tables.scaled_window("40-54", preset("cifar10")) == "40-54"
    assert tables.scaled_window("0-64", preset("digits")) == "0-24"
    assert tables.scaled_window("25-63", preset("digits")) == "11-23"
