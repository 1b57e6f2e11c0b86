"""Ranks, spectra and importance: values known beforehand, and tables made from runs whose rows are set by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from funlora_lab import functions, metrics
from funlora_lab.adapters import Adapters
from funlora_lab.config import FUNCTIONAL_METHODS, METHODS, WHOLE_NETWORK
from funlora_lab.network import build_unet
from funlora_lab.presets import preset
from funlora_lab.studies import analysis
from funlora_lab.studies.designs import scaled_window


def of_rank(k: int, outputs: int = 24, inputs: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    left = torch.randn(outputs, k, generator=generator, dtype=torch.float64)
    return left @ torch.randn(k, inputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 7, 24])
def test_rank_of_a_sum_of_k_outer_products_is_k(k):
    assert metrics.numerical_rank(of_rank(k)) == k


def test_rank_counts_the_singular_values_above_the_tolerance_only():
    values = torch.tensor([1.0, 1e-2, 1e-5, 1e-7], dtype=torch.float64)
    F = torch.diag(values)
    assert torch.allclose(metrics.singular_values(F), values)
    assert [int(metrics.numerical_rank(F, t)) for t in (1e-1, 1e-3, 1e-6, 1e-8)] == [1, 2, 3, 4]


def test_effective_rank_is_k_for_k_equal_singular_values_and_1_for_one():
    assert metrics.effective_rank(torch.eye(6)[:, :4]) == pytest.approx(4)
    assert metrics.effective_rank(of_rank(1)) == pytest.approx(1)


def test_importance_is_the_distance_from_one_per_entry():
    A, B = torch.tensor([1.5, 0.5, 1.0, 1.0]), torch.tensor([0.0, 2.0])
    assert metrics.importance(A, B) == pytest.approx(0.25 + 1.0)
    assert metrics.importance(torch.ones(3), torch.ones(5)) == 0


@pytest.mark.parametrize(("method", "expected"), [("vanilla-mul", 1), ("shift", 6), ("power-frozen", 6)])
def test_ranks_stay_within_the_bound_of_their_formula(method, expected):
    """A and B drawn at random: the bounds 1 and p are reached, never passed."""
    e = preset("smoke").but(method=method, functions=6)
    generator = torch.Generator().manual_seed(0)
    row = {
        "A": 1 + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64),
        "B": 1 + 0.5 * torch.randn(30, generator=generator, dtype=torch.float64),
        "ponderation": torch.ones(6, dtype=torch.float64),
    }
    F = analysis.matrix(SimpleNamespace(experiment=e), row)
    assert metrics.numerical_rank(F, 1e-12) == expected
    assert functions.rank_bound(FUNCTIONAL_METHODS[method][0], 6, *F.shape) == expected


def test_cosines_of_a_product_pass_the_number_of_functions():
    e = preset("smoke").but(method="funlora", functions=2)
    row = {
        "A": torch.linspace(-2, 2, 16, dtype=torch.float64),
        "B": torch.linspace(-2, 2, 16, dtype=torch.float64),
        "ponderation": torch.ones(2, dtype=torch.float64),
        "frequency": torch.tensor([1.0, 2.0], dtype=torch.float64),
    }
    assert metrics.numerical_rank(analysis.matrix(SimpleNamespace(experiment=e), row)) > 2


@pytest.fixture(scope="module")
def opened():
    """A run that was never trained: a random network, two new classes with rows set by hand."""
    e = preset("smoke").but(seed=3)
    net = build_unet(e, 6).requires_grad_(False)
    adapters = Adapters(net, e)
    rows = {cls: adapters.start(cls) for cls in (6, 7)}
    rows[7] = {name: value + 0.25 if name.endswith("/A") else value for name, value in rows[7].items()}
    return SimpleNamespace(
        experiment=e,
        network=net,
        adapters=adapters,
        classes=tuple("0123456789"),
        tasks=[[0, 1, 2, 3, 4, 5], [6, 7]],
        row=rows.__getitem__,
        runtime=SimpleNamespace(device=torch.device("cpu")),
    )


def test_importances_name_every_adapted_layer_and_new_class(opened):
    table = analysis.importances([opened])
    assert set(table["class"]) == {"6", "7"}
    assert sorted(table["layer"].unique()) == list(range(11, 24))
    assert (table[table["class"] == "6"]["importance"] == 0).all()
    assert table[table["class"] == "7"]["importance"].tolist() == pytest.approx([0.25] * 13)


def test_first_rows_have_rank_one_and_start_where_the_series_say(opened):
    assert (analysis.ranks([opened]).query("`class` == '6'")["rank"] == 1).all()
    ponderations = analysis.series([opened], "ponderation")
    assert (ponderations["value"] - ponderations["first"]).abs().max() < 1e-6
    frequencies = analysis.series([opened], "frequency")
    assert (frequencies["value"] == frequencies["function"]).all()
    spectra = analysis.spectra([opened])
    assert (spectra[spectra["position"] == 1]["value"] == 1).all()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in WHOLE_NETWORK])
def test_every_adapter_is_the_base_network_at_step_0(opened, method):
    e = opened.experiment.but(method=method)
    net = opened.network
    for parameter in net.parameters():  # the zeroed last convolutions would hide a change of everything before them
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    assert analysis.start_difference(opened, e) < 1e-4


def test_the_literal_cosine_start_is_not_the_base_network(opened):
    assert analysis.start_difference(opened, opened.experiment.but(start="literal")) > 1e-2


def test_parts_follow_the_network():
    words = analysis.parts(preset("cifar10"))
    assert [words.count(part) for part in ("encoder", "middle", "decoder", "output")] == [21, 4, 39, 1]


def test_windows_of_the_paper_keep_their_place():
    assert scaled_window("40-54", preset("cifar10")) == "40-54"
    assert scaled_window("0-64", preset("digits")) == "0-24"
    assert scaled_window("25-63", preset("digits")) == "11-23"


def test_mean_of_literal_cosines_is_what_the_reference_says():
    """F = mean cos(i) for i = 1..10 at A = B = alpha = 1: -0.14, not the identity's 1."""
    one = torch.ones(3)
    F = functions.cosine(one, one, functions.first_ponderation("cosine", "literal", 10), torch.arange(1.0, 11.0))
    assert float(F[0, 0]) == pytest.approx(sum(map(math.cos, range(1, 11))) / 10, abs=1e-6)
    assert float(F[0, 0]) == pytest.approx(-0.14, abs=0.005)
